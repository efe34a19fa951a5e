"""Data sets in the forms people have them: the same records from each; a mistake is one line."""

import csv
import datetime
import decimal
import gzip
import io
import json
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_rl.catalogue.kinds import SOURCES
from megatron_rl.config.data import chosen_sources
from megatron_rl.config.schema_data import DataConfig
from megatron_rl.data import csv_file, unpack
from megatron_rl.data.problems import read_problems
from megatron_rl.data.sources import Places, records_of_source
from megatron_rl.data.values import plain_record
from megatron_rl.errors import UserError

RECORDS = [
    {"prompt": 'What is "2, 2"?', "numbers": [2, 2], "answer": "4"},
    {"prompt": "two\nlines \u2028 \u00e9", "numbers": [1], "answer": "1,0"},
    {"prompt": "x", "numbers": [], "answer": ""},
]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def records_of(path, **part):
    data = DataConfig(train=[{"path": path, **part}])
    (source,) = chosen_sources(data, "train")
    return list(records_of_source(source, Places(), 0))


def as_csv(delimiter):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(RECORDS[0])
    writer.writerows([r["prompt"], json.dumps(r["numbers"]), r["answer"]] for r in RECORDS)
    return text.getvalue().encode()


def zstandard(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


def save_dataset(path, records):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(records).save_to_disk(path)


CELLS = {"settings": {"json_columns": ["numbers"]}}


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", JSONL, {}),
        ("a.any", JSONL, {}),
        ("a.jsonl.gz", gzip.compress(JSONL), {}),
        ("A.JSONL.GZ", gzip.compress(JSONL[:50]) + gzip.compress(JSONL[50:]), {}),
        ("a.jsonl.zst", zstandard(JSONL), {}),
        ("a.ndjson.zst", zstandard(JSONL[:50]) + zstandard(JSONL[50:]), {}),
        ("a.csv", as_csv(","), CELLS),
        ("a.csv", b"\xef\xbb\xbf" + as_csv(",") + b"\r\n\r\n", CELLS),
        ("a.tsv.gz", gzip.compress(as_csv("\t")), CELLS),
        ("a.csv.zst", zstandard(as_csv(",")), CELLS),
        (
            "a.txt",
            as_csv(";"),
            {"format": "csv", "settings": {**CELLS["settings"], "delimiter": ";"}},
        ),
    ],
)
def test_the_same_records_from_each_form(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    assert records_of(tmp_path / name, **part) == RECORDS


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist(RECORDS * 300)  # of several batches
    pyarrow.parquet.write_table(table, path, row_group_size=500)
    assert records_of(path) == RECORDS * 300
    found = records_of(path, settings={"columns": ["answer", "prompt"]})
    assert found[:1] == [{"answer": "4", "prompt": RECORDS[0]["prompt"]}]
    assert list(read_problems(path, DataConfig()).problems[1].record) == [
        "prompt",
        "numbers",
        "answer",
    ]


def test_a_directory_is_its_files_by_name(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(JSONL))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:1]), folder / "a.parquet")
    (folder / "c.csv").write_bytes(b"prompt\nz\n")
    for name in ("README.md", ".hidden.jsonl"):
        (folder / name).write_bytes(b"no record")
    assert records_of(folder) == [RECORDS[0], *RECORDS, {"prompt": "z"}]
    assert records_of(folder, format="jsonl") == RECORDS
    found = read_problems(folder, DataConfig())
    assert [found.place(n) for n in (0, 1, 3, 4)] == [
        f"{folder}/a.parquet, row 1",
        f"{folder}/b.jsonl.gz, line 1",
        f"{folder}/b.jsonl.gz, line 3",
        f"{folder}/c.csv, row 1",
    ]
    with pytest.raises(
        UserError, match=r"settings is given for .* several formats; .*format besid"
    ):
        records_of(folder, settings={"columns": ["prompt"]})


def test_a_saved_dataset_and_its_splits(tmp_path):
    save_dataset(tmp_path / "all" / "train", RECORDS)
    assert records_of(tmp_path / "all" / "train") == RECORDS
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(
        UserError, match=r"all holds the splits train of a saved dataset; .*all/train"
    ):
        records_of(tmp_path / "all")
    (tmp_path / "all" / "train" / "data-00000-of-00001.arrow").write_bytes(b"no Arrow")
    with pytest.raises(
        UserError, match=r"train: cannot be read \(.*save_to_disk has written"
    ) as error:
        records_of(tmp_path / "all" / "train")
    assert "\n" not in str(error.value)


def test_a_dataset_by_name(tmp_path, monkeypatch):
    import datasets

    asked, no_code = [], {"trust_remote_code": False}

    def load_dataset(*words, **options):
        asked.append((words, options))
        one = datasets.Dataset.from_list(RECORDS)
        return one if options["split"] else datasets.DatasetDict({"only": one})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert records_of("hf:openai/gsm8k@v1.0/train[:3]", settings={"subset": "main"}) == RECORDS
    assert records_of("hf:openai/gsm8k") == RECORDS
    assert asked == [
        (("openai/gsm8k", "main"), {"revision": "v1.0", "split": "train[:3]", **no_code}),
        (("openai/gsm8k", None), {"revision": None, "split": None, **no_code}),
    ]
    with pytest.raises(UserError, match=r"^hf:gsm8k is no name of a dataset; expected hf:ORG"):
        records_of("hf:gsm8k")


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        records_of("hf:nobody/nothing/train")
    assert str(error.value) == (
        "hf:nobody/nothing/train: cannot be read (Couldn't reach 'nobody/nothing' on the Hub "
        "(OfflineModeIsEnabled)); expected a dataset in reach (offline: one in the cache); correct "
        "or replace it"
    )


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("a.parquet", "pyarrow.parquet"),
        ("a.jsonl.zst", "pyarrow"),
        ("hf:a/b", "datasets"),
    ],
)
def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch, name, library):
    path = name if name.startswith("hf:") else tmp_path / name
    if path != name:
        path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    words = (
        rf"{name} is read with {library}, which is not installed .*; pip install 'megatron_rl\[da"
    )
    with pytest.raises(UserError, match=words):
        records_of(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a.csv: empty data set"),
        (b"prompt,a\n", r"a.csv: empty data set"),
        (b"prompt,a\nx,y\nz\n", r"a.csv, row 2: 1 cells; expected 2, as the header has"),
        (b"prompt,a\nx,y,z\n", r"a.csv, row 1: 3 cells; expected 2"),
        (b"prompt,a\n\nx,y\n", r"a.csv, row 1: blank; expected 2 cells"),
        (b'prompt,a\nx,"y" z\n', r"a.csv, row 1: not CSV \('?.*expected after"),
        (b'prompt,a\nx,"y\n', r"a.csv, row 1: not CSV \(unexpected end of data\)"),
        (b"prompt,prompt\nx,y\n", r"a.csv: column 2 of the header is 'prompt'; expected a name of"),
        (b"prompt,\nx,y\n", r"a.csv: column 2 of the header is ''; expected a name"),
        (b"prompt,a\nx,y\nx,\xff\n", r"a.csv, line 3: byte 3 is not UTF-8"),
    ],
)
def test_mistakes_in_csv(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        records_of(tmp_path / "a.csv")
    assert "\n" not in str(error.value)


def test_cells_that_are_to_be_json(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,a\nx,1\nx,NaN\n")
    with pytest.raises(UserError, match=r"a.csv, row 2: 'a' is not JSON \(NaN, which is no JSON\)"):
        records_of(path, settings={"json_columns": ["a"]})
    with pytest.raises(
        UserError, match=r"a.csv: no column 'b' among prompt, a; expected those of j"
    ):
        records_of(path, settings={"json_columns": ["b"]})


def test_a_row_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_file, "MAX_LINE_BYTES", 64)
    for row in (b'"' + b"x\n" * 40, b'"x\n",' * 20, b"x" * 70):
        (tmp_path / "a.csv").write_bytes(b"prompt\n" + row)
        with pytest.raises(
            UserError, match=r"a.csv, line \d+: a row longer than|field larger than"
        ):
            records_of(tmp_path / "a.csv")
    assert csv.field_size_limit() == 131072  # as it was


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_what_packs_too_well_is_not_unpacked(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(unpack, "MOST_BYTES", 1000)
    data = b"{}\n" * 400_000
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(gzip.compress(data) if ending == ".gz" else zstandard(data))
    most = max(1000, unpack.MOST_TIMES * path.stat().st_size)
    words = (
        rf"a.jsonl{ending}, line \d+: cannot be read \(unpacks to more than {most:,} bytes, 200 t"
    )
    with pytest.raises(UserError, match=words):
        records_of(path)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_damaged_archive_is_one_line(tmp_path, ending):
    whole = gzip.compress(JSONL) if ending == ".gz" else zstandard(JSONL)
    path = tmp_path / f"a.jsonl{ending}"
    for content in (whole[:-9], b"no archive", whole[:20] + b"\xff" * 20 + whole[40:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a.jsonl{ending}, line \d+: ") as error:
            records_of(path)
        assert "\n" not in str(error.value)


def test_mistakes_in_parquet(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no Parquet at all")
    with pytest.raises(UserError, match=r"a.parquet: cannot be read \(.*; expected a Parquet file"):
        records_of(path)
    rows = [{"prompt": "x", "image": None}] * 300 + [{"prompt": "y", "image": b"\xff"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(
        UserError, match=r"a.parquet, row 301: 'image' holds a value of type bytes;"
    ):
        records_of(path)
    assert len(records_of(path, settings={"columns": ["prompt"]})) == 301
    with pytest.raises(UserError, match=r"a.parquet: no column 'b' among prompt, image"):
        records_of(path, settings={"columns": ["b"]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "x" * 999}] * 9000), path)
    monkeypatch.setattr("megatron_rl.data.arrow.MOST_BYTES", 1000)
    with pytest.raises(UserError, match=r"a.parquet, row \d+: unpacks to more than"):
        records_of(path)


def test_what_of_tables_becomes_json():
    day, moment = datetime.date(2025, 1, 2), datetime.datetime(2025, 1, 2, 3, 4)
    found = plain_record(
        {
            "a": (1, np.float32(0.5), np.array([True])),
            "b": [day, moment, decimal.Decimal("2.00"), decimal.Decimal("0.5")],
            "c": {"d": None},
        }
    )
    assert found == {
        "a": [1, 0.5, [True]],
        "b": ["2025-01-02", "2025-01-02T03:04:00", 2, 0.5],
        "c": {"d": None},
    }
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "a record is of type int; expected a mapping of columns"),
        ({1: 2}, "the record has the key 1; expected text"),
        ({"a": float("nan")}, "'a' holds nan; expected a finite number"),
        ({"a": 10**300}, "'a' holds a number too large"),
        ({"a": decimal.Decimal("1e999999")}, "'a' holds inf; expected a finite number"),
        ({"a": "\ud83d"}, "'a' holds half a surrogate pair"),
        ({"a": [b"x"]}, "'a' holds a value of type bytes"),
        ({"a": {1, 2}}, "'a' holds a value of type set"),
    ],
)
def test_what_is_no_record(record, message):
    with pytest.raises(UserError, match=message):
        plain_record(record)


OWN = """
from megatron_rl.extend import Settings, source

class Range(Settings):
    count: int
    "How many."

@source(settings=Range)
def numbers(settings):
    "Sums of two."
    for n in range(settings.count):
        yield {"prompt": f"{n} + {n} =", "answer": 2 * n}

class Twice:
    def __call__(self):
        return [{"prompt": "a"}, {"prompt": "b"}]

def fails():
    yield {"prompt": "a"}
    raise ValueError("the database is gone")

def wrong():
    return [{"prompt": "a"}, "b"]

def none():
    return []

def takes(path):
    return []
"""


def test_ones_own_source(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    found = records_of(f"{path}:numbers", settings={"count": 2})
    assert found == [{"prompt": "0 + 0 =", "answer": 0}, {"prompt": "1 + 1 =", "answer": 2}]
    assert records_of(f"{path}:Twice") == [{"prompt": "a"}, {"prompt": "b"}]
    for name, settings, message in (
        ("fails", {}, r"fails', record 2, raised ValueError the database is gone \(.*mine.py:20\)"),
        ("wrong", {}, r"wrong', record 2: a record is of type str; expected a mapping"),
        ("none", {}, r"none: empty data set; expected a record or more"),
        ("takes", {}, r"which is takes\(path\); expected takes\(\)"),
        ("nmbers", {}, r"has no nmbers \(did you mean numbers\?\)"),
        (
            "numbers",
            {"cont": 2},
            r"data.train.0.settings.cont is no setting of the data source .*nu",
        ),
        ("numbers", {}, r"data.train.0.settings.count is not given"),
    ):
        with pytest.raises(UserError, match=message) as error:
            records_of(f"{path}:{name}", settings=settings)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"path": "a.csv", "format": "cvs"},
            r"format is 'cvs' \(did you mean csv\?\); expected one",
        ),
        ({"path": "a.csv", "settings": {"columns": ["a"]}}, r"no setting of the data source csv"),
        (
            {"path": ".", "format": "parquet"},
            r"a directory without data files; expected .*\*.parquet",
        ),
        ({"path": "a.csv", "label": "A b"}, r"data.train.0.label is 'A b'; expected a name"),
        (
            {"path": "a.csv", "template": "{a}", "prompt_key": "a"},
            r"a template and a prompt_key; exp",
        ),
        (
            {"path": "nothing.jsonl"},
            r"data set nothing.jsonl does not exist; expected a JSONL file",
        ),
        ({"path": "nothing.csv"}, r"data set nothing.csv does not exist; expected a CSV file"),
        ({"path": "no_such_module:thing"}, r"there is no module 'no_such_module'"),
    ],
)
def test_mistakes_of_the_configuration(tmp_path, monkeypatch, part, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        records_of(**part)


def test_every_row_says_what_a_record_is_called():
    assert {row.name: row.unit for row in SOURCES.rows} == {
        "jsonl": "line",
        "csv": "row",
        "parquet": "row",
        "saved": "row",
        "hub": "row",
    }
