"""The command ``jaxlora``: arguments to recipes."""

import pathlib
import sys
from collections.abc import Sequence

from jaxlora.recipes import environment, quickstart
from jaxlora.train.loop import Interrupted


def run_quickstart(output_dir: pathlib.Path = pathlib.Path("jaxlora_quickstart"), seed: int = 0) -> None:
    """Make a small vision-language model, teach it, adapt it in 4 bits, save it, load it again and compare. Offline, in minutes.

    Args:
        output_dir: Where models and pictures are written.
        seed: Draws weights, adapters and the order of the rows.
    """
    quickstart.run(quickstart.QuickstartConfig(output_dir=output_dir, seed=seed))


def show_environment() -> None:
    """Print the versions and devices in use."""
    environment.show()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand; ``arguments`` None: those of the process. A run that a signal stopped exits with 128 + its number.

    >>> # main(["quickstart", "--output-dir", "out"])

    Raises:
      ImportError: tyro is missing; says what to install.
    """
    try:
        import tyro
    except ImportError as error:
        raise ImportError("the command line needs tyro: pip install 'jaxlora[cli]'") from error
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"quickstart": run_quickstart, "env": show_environment},
            prog="jaxlora",
            description="LoRA and QLoRA fine-tuning of language and vision-language models in JAX.",
            args=arguments,
        )
    except Interrupted as stopped:
        print(f"jaxlora: {stopped}", file=sys.stderr)
        raise SystemExit(128 + stopped.signum) from None


if __name__ == "__main__":
    main()
