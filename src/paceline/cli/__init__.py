"""The command line: `main.py` finds the commands, one file each, in `verbs/`."""
