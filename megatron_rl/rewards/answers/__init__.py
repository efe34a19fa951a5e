"""Finds mathematical answers in a completion, reads them by kind and compares them.

    text      one spelling for many            tokens    of a text
    extract   where the answer stands          algebra   trees of expressions
    kinds     what an answer can be            evaluate  values of trees
    literals  numbers, numerals, dates         equal     numbers and expressions
    units     units of measure                 compare   everything else, by kind
    read      from text to kinds

Nothing here runs for long or raises on a completion; ``math_worker`` has the part for SymPy.
"""
