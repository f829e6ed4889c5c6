"""`python -m batiste` is the command `batiste`."""

from batiste.command_line import run

if __name__ == "__main__":
    run()
