"""The cases of ``gpu_check.py``: one module per kind of work; importing one does nothing else.
:mod:`gpu_checks.main` has the list."""
