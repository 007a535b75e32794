"""The one table: a row for each figure, with its limit and whether it is kept."""
import json, sys

OK, FAIL, SKIPPED = "ok", "FAIL", "skipped"


class Table:
    def __init__(self):
        self.rows = []

    def add(self, name, value, limit, verdict, why=""):
        row = dict(name=name, value=value, limit=limit, verdict=verdict, why=why)
        self.rows.append(row)
        print("gpu_check: " + " | ".join(cells(row)), file=sys.stderr, flush=True)

    def at_most(self, name, value, limit, form="{:.3g}"):
        self._compare(name, value, limit, "<=", value is not None and value <= limit, form)

    def at_least(self, name, value, limit, form="{:.3g}"):
        self._compare(name, value, limit, ">=", value is not None and value >= limit, form)

    def figure(self, name, value):
        """A figure without a limit: that there is one is the check."""
        self.add(name, value, "", OK)

    def fail(self, name, why):
        self.add(name, "", "", FAIL, why)

    def skip(self, name, why):
        self.add(name, "", "", SKIPPED, why)

    def _compare(self, name, value, limit, sign, kept, form):
        # NaN is written as null where it comes from JSON, and keeps no limit.
        shown = "NaN" if value is None else form.format(value)
        self.add(name, shown, f"{sign} {form.format(limit)}", OK if kept else FAIL)

    def num_failed(self):
        return sum(row["verdict"] == FAIL for row in self.rows)

    def markdown(self):
        lines = [("name", "value", "limit", "verdict"), *map(cells, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
        return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])

    def json(self):
        return json.dumps(self.rows, indent=1) + "\n"


def cells(row):
    verdict = f"{row['verdict']}: {row['why']}" if row["why"] else row["verdict"]
    return row["name"], row["value"], row["limit"], verdict.replace("|", "/")
