"""``python -m anarcho_cli``: the `anarcho` command of this very interpreter, wherever the script is installed."""

from anarcho_cli.main import run

if __name__ == "__main__":
    run()
