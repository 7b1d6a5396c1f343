"""The command `spd-zoo`, one file per command: parse, call one function, print.

Slow imports are postponed until a command needs them: `main` calls `load_networks` for commands that need the
networks, and a command imports its other modules only when it runs.
"""
