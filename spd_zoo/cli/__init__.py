"""The command `spd-zoo`."""
