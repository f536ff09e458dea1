"""The battery of `make torture`: faults and attacks, and what becomes of the runs that meet them.

Each file has the cases of one kind. `battery.py` says what a case is, `programs.py` runs commands of the package with
a fault, and `__main__.py` runs all cases and prints the table.
"""
