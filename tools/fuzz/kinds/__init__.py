"""One file a kind; each has a ``KIND``. A file that is put here is run."""
