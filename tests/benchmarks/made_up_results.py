"""Results as the runner writes them, made up by hand, and tables read back."""

import torch

from benchmarks.experiments import load_experiment
from benchmarks.reporting._estimates import Results
from benchmarks.running._judging import to_hex


def bits(text):
    return torch.tensor([bit == "1" for bit in text])


def made_up(broken, *, eligible="11111111", eroc=0.5, rates=("0.01",), **more):
    """A result as the runner writes it; `broken` by variant, an image a digit."""
    at = {
        name: {
            "success": [int((bits(mask) & bits(eligible)).sum()), int(bits(eligible).sum())],
            "false_positives": [1, 8],
            "invalid": 0,
            "eligible": to_hex(bits(eligible)),
            "broken": to_hex(bits(mask) & bits(eligible)),
        }
        for name, mask in broken.items()
    }
    areas = eroc if isinstance(eroc, dict) else dict.fromkeys(broken, eroc)
    variants = {name: {"eroc": areas[name], "rates": dict.fromkeys(rates, at[name])} for name in broken}
    made = {"commit": "abc", "device": "a machine"}
    return {"images": 8, "accuracy": [7, 8], "results": variants, "stages": [], "provenance": made, **more}


def points(*accepted):
    """Two benign images and their attacked versions, both of which change their labels."""
    places = {"benign": [[0.0, 0.0], [1.0, 1.0]], "attacked": [[1.0, 0.9], [0.1, 0.0]]}
    return {
        "points": {
            **places,
            "labels": [0, 1],
            "benign_labels": [0, 1],
            "attacked_labels": [1, 0],
            "accepted": list(accepted),
        }
    }


def load_table(address, profile="full"):
    """A table by its address, such as "seeds-mnist/strict"."""
    tables = load_experiment(address.partition("/")[0], profile).tables
    (wanted,) = (table for table in tables if table.address == address)
    return wanted


def find(name, profile="full", **wanted):
    cells = load_table(name, profile).cells
    return [cell for cell in cells if all(getattr(cell, key) == value for key, value in wanted.items())]


def read(name, made, profile="full"):
    """A table of which `found` is all that has been run: (detector, attack) -> result."""
    table = load_table(name, profile)
    keys = {cell.key: made.get((cell.detector, cell.attack)) for cell in table.cells}
    return Results(table, keys.get)


def rows(table):
    """A Markdown table as row name -> column -> lines of the cell."""
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {
        name: {column: cell.split("<br>") for column, cell in zip(head[1:], cells, strict=True)}
        for name, *cells in body
    }
