"""`python -m elastic`: the command line, by the Python that has the task's packages."""

from elastic.cli import main

if __name__ == "__main__":
    main()
