"""The command `spd-zoo`, one file per command: parse, call one function, print.

Nothing that takes long is imported before a command needs it: `main` calls `load_networks` for commands that need
the networks, and a command imports what it runs when it runs.
"""
