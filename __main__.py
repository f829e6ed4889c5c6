"""`python -m batiste` is the command `batiste`."""

from batiste.main import run

if __name__ == "__main__":
    run()
