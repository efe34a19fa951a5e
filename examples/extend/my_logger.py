"""A logger: a CSV file with a line for each step, opened and closed at each line."""

from pathlib import Path

from megatron_rl.extend import Settings, logger


class CsvSettings(Settings):
    """What is written, and where."""

    names: list[str] = ["loss", "reward/mean", "grad_norm"]
    """Metrics to write, in this order."""
    file: Path = Path("steps.csv")
    """The file, in the run directory."""


@logger(settings=CsvSettings)
class CsvLogger:
    """Some metrics of each step as CSV."""

    def __init__(self, run, settings: CsvSettings) -> None:
        self.path, self.names = run.directory / settings.file, settings.names
        if run.resume_step is None:
            self.path.write_text(",".join(["step", *self.names]) + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Rank 0 alone calls it, after each step."""
        values = [metrics.get(name, "") for name in self.names]
        with self.path.open("a") as file:
            file.write(",".join(map(str, [step, *values])) + "\n")

    def close(self) -> None:
        """At the end of the run, whatever ends it."""
