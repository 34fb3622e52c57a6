"""`python -m selfalign`, the command `selfalign`."""

from selfalign.cli.main import main

if __name__ == "__main__":
    main()
