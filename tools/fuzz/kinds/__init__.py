"""One file for each kind, with a ``KIND``. Every file here is run."""
