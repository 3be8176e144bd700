"""Mutated files for every reader: none may give a traceback, a hang, a message in Python's words, or a wrong success.

    python tests/robustness/mutations.py --cases 20000 --out mutations.jsonl

Each case mutates one file of a small sound sample, calls the reader in this process, and appends a line to the file. A
case depends on its number alone, so that a sweep that was stopped goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

LIMIT_S = 10.0  # a case that takes longer hangs
MEMORY = 24 << 30  # bytes of addresses; a header that asks for more must not get it
# Every so many cases of a whole folder, the program itself reads it, in a process of its own.
PROGRAM_EVERY = 20
PYTHON_WORDS = re.compile(r"__init__|NoneType|object has no|Traceback|unexpected keyword|positional argument|<class '")
BAD = ("traceback", "hang", "words", "wrong")


class Hang(BaseException):
    """A case took longer than LIMIT_S. No reader catches it."""


@dataclass(frozen=True)
class Reader:
    """One reader: the files of the sample that are mutated, and the function that reads the mutated folder.

    ``wrong`` says how an accepted folder differs from what the reference library reads; "" where it does not.
    """

    files: tuple[str, ...]
    read: Callable[[Path], object]
    wrong: Callable[[Path, object], str] = lambda root, result: ""


# --- mutations -------------------------------------------------------------------------------------------------------

BASE = {"unet/a.weight": "ab"}  # the digest of the base's tensor that the sample's ONNX folder replaces
SHARDS = "diffusion_pytorch_model.safetensors.index.json"
ENCODINGS = ("utf-16", "utf-32", "utf-8-sig", "latin-1")
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    7.5,
    2**70,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 3000,
    "\x1b[31mred\x07",
    "../../etc/passwd",
    "a\ud800",
    [],
    {},
    [[]],
    [None],
    {"": None},
    "DEEP",
)


def _deep(levels: int, table: bool) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value} if table else [value]
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:50]) if isinstance(value, list) else ()
    for key, child in items:
        yield from _places(child, (*path, key))


def mutate_content(content: Any, rng: random.Random) -> str:
    """JSON with one or two places replaced, removed, renamed, or there twice."""
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice([*_places(content)])
        value = rng.choice(VALUES)
        value = _deep(rng.choice((60, 150, 900)), rng.random() < 0.5) if value == "DEEP" else value
        if not path:
            content = value if rng.random() < 0.2 else content
            continue
        *outer, last = path
        inner = content
        for key in outer:
            inner = inner[key]
        action = rng.randrange(4)
        if action == 0:
            inner[last] = value
        elif action == 1:
            del inner[last]
        elif action == 2 and isinstance(inner, dict):
            inner[rng.choice(("", "x", "\x1b]0;t\x07", "a" * 500))] = inner.pop(last)
        elif isinstance(inner[last], int) and not isinstance(inner[last], bool):
            inner[last] += rng.choice((-4, -1, 1, 2, 4, 8, 10**6))
        elif isinstance(inner, list):
            inner.append(inner[last])
        else:
            inner[last] = value
        if not isinstance(content, dict | list):
            break
    text = json.dumps(content)
    if rng.random() < 0.1 and (match := re.search(r'"[^"]+": ?[^,{}\[\]]+', text)):
        text = text.replace(match[0], f"{match[0]}, {match[0]}", 1)
    return text


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one damage as disks, networks, editors and people make it."""
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 40))
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: data[:at],
        lambda: data[:at] + data[at + size :],
        lambda: data[:at] + rng.randbytes(size) + data[at:],
        lambda: data[:at] + rng.randbytes(size) + data[at + size :],
        lambda: data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :] if at < len(data) else b"",
        lambda: data + rng.choice((b"x", bytes(100), data[-50:])),
        lambda: data[:at] + data[at : at + size] * 3 + data[at:],
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        lambda: data.decode("utf-8", "replace").encode(
            rng.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1")), "replace"
        ),
        lambda: re.sub(rb"\d+", lambda match: str(rng.choice(VALUES[1:9])).encode(), data, count=1 + at % 9),
        lambda: data.replace(b'"', rng.choice((b"", b"'", b'"""')), 1 + at % 5),
        lambda: data[:at] + b"[" * rng.choice((50, 3000, 100_000)) + data[at:],
        lambda: b"",
    )
    return rng.choice(kinds)()


def mutate(path: Path, rng: random.Random) -> None:
    """Damage one file: its content where it is JSON or a header, else, and half of the time, its bytes."""
    from erasec.checkpoint.sealed import DIGEST

    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = 8 < length < len(data) - 8 and data[8:9] == b"{"
    if rng.random() < 0.5 and (header or path.suffix == ".json"):
        content = json.loads(data[8 : 8 + length] if header else data)
        entries = [key for key in content.get("__metadata__", {}) if key.startswith("erasec.")] if header else []
        entries = [key for key in entries if key != DIGEST]
        if entries and rng.random() < 0.8:
            own = content["__metadata__"]
            own[entries[0]] = mutate_content(json.loads(own[entries[0]]), rng)
            own.pop(DIGEST, None)  # which would refuse every change before it is read
            text = json.dumps(content).encode()
        else:
            text = mutate_content(content, rng).encode("utf-8", "surrogatepass")
        data = (len(text).to_bytes(8, "little") + text + data[8 + length :]) if header else text
    elif header and rng.random() < 0.7:
        data = mutate_bytes(data[: 8 + length], rng) + data[8 + length :]
    else:
        data = mutate_bytes(data, rng)
    path.unlink()
    path.write_bytes(data)


# --- readers ---------------------------------------------------------------------------------------------------------


def make_sample(root: Path, single: bool = True) -> dict[str, Reader]:
    """Write a sound sample of every format into ``root``, and return the readers.

    ``single`` says whether there is a single file among them, which takes the longest.
    """
    import torch
    from PIL import Image
    from random_models import random_folder, random_pipeline

    from erasec.base import Context
    from erasec.checkpoint import journal, pickles
    from erasec.checkpoint import manifest as checkpoint_manifest
    from erasec.checkpoint.folder import Folder
    from erasec.checkpoint.safetensors import read_header, read_tensor, save_tensors
    from erasec.closed_form import priors
    from erasec.commands import belonging, combine, diff, output_paths, relink
    from erasec.documents import read_captions
    from erasec.errors import CheckFailed, ErasecError
    from erasec.family import FAMILIES
    from erasec.graphs.graph import Template, Weight
    from erasec.graphs.manifest import read_manifest, write_manifest
    from erasec.judging.prompt_files import read_prompts
    from erasec.keys.key_file import fold_secret, read_key, write_key
    from erasec.model import edit_file, loading, sidecar
    from erasec.model.memory import Memory, Secret
    from erasec.model.networks import load_network
    from erasec.passes.uce import Uce
    from erasec.recipe import concept, recipe
    from erasec.recipe.concept import Concept
    from erasec.reporting.bom import BOM
    from erasec.reporting.provenance import BUILD, PREDICATE, PROVENANCE, STATEMENT
    from erasec.reporting.read import read_report
    from erasec.runtime.bundle import latent_shape
    from erasec.runtime.clip_tokenizer import load_tokenizer
    from erasec.runtime.schedulers import make_scheduler
    from erasec.targets.ldm import Ldm
    from erasec.tensorrt.engines import Builder, read_record, write_record
    from erasec.training.boxes import read_annotated_images
    from erasec.training.triplets import read_triplets

    star = Concept(name="star", erase=("star",), anchor="circle", keep=("square",))
    draw = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    # A checkpoint as a folder, as shards, and as a single file.
    folder = root / "folder"
    random_pipeline(folder, dtype=torch.float16)
    base = loading.load(str(folder))
    denoiser = SimpleNamespace(model=base, size=8, encode=lambda squares: squares)
    shards = {f"diffusion_pytorch_model-0000{number}-of-00002.safetensors": str(number) for number in (1, 2)}
    where = {}
    for name, key in shards.items():
        save_tensors(root / "sharded" / "unet" / name, {key: rows(3)})
        where[key] = name
    (root / "sharded" / "unet" / SHARDS).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    if single:
        random_folder(root / "sd1", "sd1")
        Ldm().export(Folder(root / "sd1"), root, Context())
        next(root.glob("*.safetensors")).rename(root / "single.safetensors")
    memory = Memory("mid_block.attentions.0.transformer_blocks.0.attn2", rows(2, 192), rows(2, 192))

    # Files of erasec itself.
    edited = base.with_edit(Uce().solve(base, star, Context()))
    edit_file.write_edits(root / "star.edit.safetensors", edited.edits, edited.base_record())
    secret = Secret("star", rows(4, 128), rows(4, 128), (memory.attention,))
    write_key(root / "star.key", secret, star, "kpop", "1", "ab" * 32)
    (root / "extras").mkdir()
    sidecar.write_extras(root / "extras", sidecar.Extras((memory,), {"<a>": rows(128)}, "a star"))
    (root / "captions.csv").write_text("id,prompt\n1,a red star\n2,a circle\n")
    lines = ('"a star, at night","hate, violence",41,7.5', "a circle,hate,7.0,")
    (root / "prompts.csv").write_text("\n".join(("prompt,categories,evaluation_seed,evaluation_guidance", *lines)))
    priors.write(root / "coco.prior.safetensors", base, root / "captions.csv")
    weight = {"name": "w", "key": "a.weight", "source": [2, 3], "axes": [1, 0], "shape": [3, 2], "dtype": "float32"}
    graph = {
        "component": "unet",
        "graph": "ab",
        "precision": "fp32",
        "files": {},
        "weights": [weight],
        "edited": [weight],
    }
    (root / "onnx").mkdir()
    write_manifest(
        root / "onnx",
        {"precision": "fp32", "vae": "fp32", "graphs": {"unet": graph}, "files": {}, "base": BASE, "carried": []},
    )
    (root / "graph").mkdir()
    (root / "graph" / "weights.json").write_text(json.dumps([weight]))
    (root / "trt").mkdir()
    profile = {"sample": {part: [1, 4, 8, 8] for part in ("min", "opt", "max")}}
    entry = {"file": "unet/model.engine", "engine": "ab", "graph": "ab", "weights": "ab", "profile": profile}
    write_record(root / "trt", Builder("tensorrt_rtx"), "1.7.0", {"unet": entry})
    (root / "out").mkdir()
    written = [{"target": "hf", "path": "hf", "bytes": 1, "files": {"a": {"bytes": 1, "sha256": "ab" * 32}}}]
    report = {"schema": "erasec.report/1", "written": written, "seconds": {"solve": 1.5}}
    (root / "out" / "report.json").write_text(json.dumps(report))
    checkpoint_manifest.write(root / "out")
    belonging._schema_fault("{}")  # loading the schema takes seconds, which count for the first case otherwise
    (root / "proof").mkdir()
    resource_record = {"name": "hf/a", "digest": {"sha256": "ab" * 32}}
    definition = {"buildType": BUILD, "internalParameters": {"edited": {"unet/a": "ab" * 32}}}
    definition["resolvedDependencies"] = [resource_record]
    predicate = {
        "buildDefinition": definition,
        "runDetails": {"byproducts": [resource_record], "erasec_outcome": "passed"},
    }
    subject = {"_type": STATEMENT, "subject": [resource_record], "predicateType": PREDICATE, "predicate": predicate}
    (root / "proof" / PROVENANCE).write_text(json.dumps(subject))
    file = {
        "type": "file",
        "name": "hf/a",
        "bom-ref": "file:hf/a",
        "hashes": [{"alg": "SHA-256", "content": "ab" * 32}],
    }
    built = {"type": "machine-learning-model", "name": "a", "bom-ref": "model", "version": "ab" * 32}
    bill = {"bomFormat": "CycloneDX", "specVersion": "1.6", "metadata": {"component": built}, "components": [file]}
    (root / "proof" / BOM).write_text(json.dumps(bill))
    proof_report = {
        "outcome": "passed",
        "verdict": "a",
        "digest": "ab" * 32,
        "model": {"name": "a", "revision": "", "digest": "ab" * 32},
        "concepts": [{"name": "star"}],
        "applied": [{"by": "uce", "digest": "ab" * 32}],
        "written": [{**written[0], "bytes": 1}],
        "undoing": [{"path": "star.key", "inside": True, "undoes": "x"}],
        "extras": {"keys": []},
        "unjudged": [],
    }
    (root / "proof" / "report.json").write_text(json.dumps(proof_report))
    for table, text in (
        ("boxes.csv", "file,left,top,right,bottom,caption\n0.png,2,3,9,9,a star\n1.png,,,,,\n"),
        ("triplets.csv", "concept,censored,benign\n0.png,1.png,1.png\n"),
    ):
        pictures = root / table.removesuffix(".csv")
        pictures.mkdir()
        (pictures / table).write_text(text)
        for number in range(2):
            Image.new("RGB", (16, 12), (80 * number, 9, 9)).save(pictures / f"{number}.png")
    (root / "recipe.toml").write_text(recipe.to_toml(recipe.Recipe(model="glyphs", erase=("star",), concept=(star,))))
    shutil.copyfile(concept.library("glyphs")["star"], root / "star.toml")
    save_tensors(root / "plain.safetensors", {"a": rows(3, 4), "b": rows(5).half(), "c": torch.arange(4)}, {"k": "v"})
    torch.save({"a": rows(3, 4), "b": rows(5)}, root / "model.bin")

    # A journal of an edit that was stopped before the files were changed.
    (root / "broken").mkdir()
    shutil.copyfile(root / "plain.safetensors", root / "broken" / "plain.safetensors")
    redo = journal._redo
    journal._redo = lambda handle, files: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[assignment]
    try:
        with suppress(ErasecError):  # it says that the edit was interrupted
            journal.patch_in_place({root / "broken" / "plain.safetensors": {"b": lambda: torch.zeros(5).half()}})
    finally:
        journal._redo = redo
    journal_file = next((root / "broken").glob(".*journal")).name

    def tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        entries, metadata = read_header(path)
        return {key: read_tensor(entry) for key, entry in entries.items()}, metadata

    def other_than_library(path: Path, ours: object) -> str:
        from safetensors import safe_open

        assert isinstance(ours, tuple)
        try:
            with safe_open(path, "pt") as opened:
                theirs, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
        except Exception as error:
            return f"the library refuses it: {error}"
        same = theirs.keys() == ours[0].keys() and metadata == ours[1]
        same = same and all(
            value.dtype == ours[0][key].dtype and torch.equal(value.nan_to_num(), ours[0][key].nan_to_num())
            for key, value in theirs.items()
        )
        return "" if same else "the library reads other tensors"

    def load_folder(at: Path) -> None:
        model = loading.load(str(at))
        assert model.sites and model.family is FAMILIES["sd1"]
        model.encode(["a star"])
        load_tokenizer(at / "tokenizer", 77).ids(["a star"])
        config = model.source.config("scheduler", "scheduler_config.json")
        for component in ("unet", "vae"):
            model.source.config(component)
        latent_shape(model.source.config("unet"), model.source.config("vae"), None, None)
        make_scheduler(config, 4, "auto")

    def load_networks(at: Path) -> None:
        model = loading.load(str(at))
        load_network(model, "unet", "UNet2DConditionModel")
        load_network(model, "vae", "AutoencoderKL")

    def differences(at: Path) -> None:
        diff.compare(root / "folder", at)

    def load_weights(at: Path) -> dict[str, torch.Tensor]:
        return {key: read_tensor(entry) for key, entry in Folder(at).entries("unet").items()}

    def apply(at: Path) -> None:
        edits, _ = edit_file.read_edits(at)
        relink.read_edit(at)
        model = base
        for edit in edits:
            model = model.with_edit(edit)
        for make in [make for part in model.merged().values() for make in part.values()][:2]:
            make()
        combine.combine([at], (), at.with_name("combined.edit.safetensors"))

    def manifest(at: Path) -> None:
        content = read_manifest(at)
        relink._check_same(content, BASE, at, at / "edit")

    def compared(at: Path) -> None:
        checkpoint_manifest.compare(at, checkpoint_manifest.read(at)[0])

    def proof(at: Path) -> None:
        bundle = belonging.Bundle(at, checkpoint_manifest.Manifest(schema="erasec.manifest/1", files={}))
        for step in (belonging.provenance, belonging.bill, belonging.report):
            try:
                step(bundle)
            except CheckFailed as error:  # of files that the sample does not have, or of what was mutated
                if judged(str(error))["outcome"] != "refused":
                    raise

    def pickled(at: Path) -> None:
        pickles.from_pickle(at, at.with_name("new.safetensors"))

    def recovered(at: Path) -> None:
        journal.pending(at / "plain.safetensors")
        journal.recover(at)
        tensors(at / "plain.safetensors")

    def weights_json(at: Path) -> tuple[Weight, ...]:
        return Template(at, "ab").weights

    configs = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
    tokenizer = tuple(
        f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
    )
    weights = ("text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors")
    whole = {"single.safetensors": Reader(("",), lambda at: loading.load(str(at)).sites)} if single else {}
    return whole | {
        "plain.safetensors": Reader(("",), tensors, other_than_library),
        "folder": Reader(("model_index.json", *configs, *tokenizer), load_folder),
        "folder ": Reader(configs[:3], load_networks),
        "folder  ": Reader(weights, load_folder),
        "folder   ": Reader((*weights, "model_index.json", *configs), differences),
        "sharded": Reader((f"unet/{SHARDS}",), load_weights),
        "recipe.toml": Reader(("",), recipe.from_file),
        "star.toml": Reader(("",), concept.from_file),
        "star.edit.safetensors": Reader(("",), apply),
        "star.key": Reader(("",), lambda at: fold_secret(read_key(at).secret, base.entries("unet"))),
        "extras": Reader(("erasec.safetensors",), sidecar.read_extras),
        "coco.prior.safetensors": Reader(("",), lambda at: priors.read(str(at), base, "context")),
        "captions.csv": Reader(("",), read_captions),
        "prompts.csv": Reader(("",), read_prompts),
        "onnx": Reader(("erasec.json",), manifest),
        "graph": Reader(("weights.json",), weights_json),
        "trt": Reader(("engine.json",), read_record),
        "out": Reader(("report.json",), lambda at: (output_paths._foreign_files(at), read_report(at))),
        "out ": Reader((checkpoint_manifest.FILE,), compared),
        "proof": Reader((PROVENANCE, BOM, "report.json"), proof),
        "boxes": Reader(("boxes.csv", "0.png"), lambda at: read_annotated_images(at, denoiser)),  # type: ignore[arg-type]
        "triplets": Reader(("triplets.csv", "0.png"), lambda at: read_triplets(at, 8)),
        "model.bin": Reader(("",), pickled),
        "broken": Reader((journal_file, "plain.safetensors"), recovered),
    }


# --- the sweep -------------------------------------------------------------------------------------------------------


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise Hang in the block after LIMIT_S."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def copy(source: Path, target: Path) -> None:
    """A copy of a file or a folder whose weights are links, so that a case costs little."""
    if source.is_file():
        shutil.copyfile(source, target)
        return
    for path in source.rglob("*"):
        if path.is_file():
            new = target / path.relative_to(source)
            new.parent.mkdir(parents=True, exist_ok=True)
            if path.stat().st_size > 200_000:
                new.hardlink_to(path)
            else:
                shutil.copyfile(path, new)


def run_case(number: int, sample: Path, readers: dict[str, Reader]) -> dict[str, Any]:
    """Case ``number``: the reader, the file and what came of it, see ``outcome``."""
    rng = random.Random(number)
    name = rng.choice([*readers])
    reader, file = readers[name], rng.choice(readers[name].files)
    with tempfile.TemporaryDirectory(dir=sample, prefix=".case-") as scratch:
        root = Path(scratch) / name.strip()
        copy(sample / name.strip(), root)
        mutate(root / file if file else root, rng)
        start = time.monotonic()
        result = outcome(reader, root)
        record = {"case": number, "reader": name.strip(), "file": file or name, **result}
        record["seconds"] = round(time.monotonic() - start, 3)
        if name == "folder" and number % PROGRAM_EVERY == 0:
            record |= run_program(root)
    return record


def outcome(reader: Reader, root: Path) -> dict[str, str]:
    """The outcome of a case: "refused" or "accepted"; or one of BAD.

    "words" is a message that is long, not printable or in Python's words; "wrong" is a file that is accepted with
    another content than the reference library reads.
    """
    from erasec.errors import ErasecError

    try:
        with time_limit():
            result = reader.read(root)
            if why := reader.wrong(root, result):
                return {"outcome": "wrong", "detail": why}
    except ErasecError as error:
        return judged(str(error))
    except OSError as error:  # the command line prints the words of the system
        return {"outcome": "refused", "detail": str(error)[:200]}
    except Hang:
        return {"outcome": "hang", "detail": traceback.format_exc(limit=-3)[-600:]}
    except Exception:
        return {"outcome": "traceback", "detail": traceback.format_exc(limit=-4)[-900:]}
    return {"outcome": "accepted"}


def judged(message: str) -> dict[str, str]:
    """Whether a message is one that people can read."""
    plain = all(line.isprintable() for line in message.split("\n"))
    good = plain and len(message) < 1900 and not PYTHON_WORDS.search(message)
    return {"outcome": "refused" if good else "words", "detail": message[: 100 if good else 3000]}


def run_program(folder: Path) -> dict[str, str]:
    """What the program itself makes of a mutated folder."""
    command = [sys.executable, "-m", "erasec", "plan", str(folder), "--erase", "star"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder.parent)
    except subprocess.TimeoutExpired:
        return {"outcome": "hang", "detail": "erasec plan"}
    if done.returncode in (0, 2, 3, 4) and "Traceback" not in done.stderr:
        return {"program": str(done.returncode)}
    return {"outcome": "traceback", "detail": done.stderr[-900:]}


def sweep(cases: int, out: Path, first: int = 0, reader: str = "") -> Counter[str]:
    """Run cases up to number ``first`` + ``cases`` that ``out`` does not hold yet. Returns how often each outcome is in
    ``out``."""
    from erasec.cli.app import QUIET

    os.environ.update(QUIET)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    done = {json.loads(line)["case"] for line in out.read_text().splitlines()} if out.is_file() else set()
    with tempfile.TemporaryDirectory(prefix="erasec-mutations-") as scratch, out.open("a") as stream:
        readers = make_sample(Path(scratch))
        if reader:
            readers = {name: value for name, value in readers.items() if name.strip() == reader}
        for number in range(first, first + cases):
            if number in done:
                continue
            record = run_case(number, Path(scratch), readers)
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            if record["outcome"] in BAD:
                print(json.dumps(record, indent=1), file=sys.stderr)
    return Counter(json.loads(line)["outcome"] for line in out.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--reader", default="", help="one reader by its file or folder; by default all")
    parser.add_argument("--out", type=Path, default=Path("mutations.jsonl"))
    options = parser.parse_args()
    counts = sweep(options.cases, options.out, options.first, options.reader)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    raise SystemExit(any(counts[outcome] for outcome in BAD))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
