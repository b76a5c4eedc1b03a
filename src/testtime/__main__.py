"""`python -m testtime`, where scripts are not on the path."""

from testtime.cli.main import app

if __name__ == "__main__":
    app(prog_name="testtime")
