"""A logger: a CSV file with a line for each step, opened and closed at each line."""

from pathlib import Path

from megatron_rl.extend import Settings, logger


class CsvSettings(Settings):
    """The metrics and the file."""

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
        """Called after each step, only on rank 0."""
        values = [metrics.get(name, "") for name in self.names]
        with self.path.open("a") as file:
            file.write(",".join(map(str, [step, *values])) + "\n")

    def close(self) -> None:
        """Called at the end of the run, also after an error."""
