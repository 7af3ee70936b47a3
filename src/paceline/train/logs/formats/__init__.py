"""Where rows of measurements go; one file, one format.

Each module has `open_log(folder, name, first_step)`, which returns an object with `write(row)` and `close()`.
A row maps column names to numbers, strings, booleans or None; `first_step` is the step at which a resumed run
goes on, else None. What is written survives the death of the process.
"""
