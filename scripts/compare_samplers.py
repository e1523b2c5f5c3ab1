"""Compare decoding methods on one model: calls, time, memory, exactness, quality; one page, every number with its conditions.

    python scripts/compare_samplers.py --run runs/my-run --samplers ar sjd sjd-gumbel gsd --report out/
    python scripts/compare_samplers.py --run runs/my-run --draft-run runs/small --drafter-run runs/eagle \
        --classifier runs/demo/classifier.safetensors --reference digits --report out/      # every method that it can
    python scripts/compare_samplers.py --published llamagen-b-256 --samplers ar sjd gsd:half=3 --report out/

Methods are files of configs/samplers; NAME:key=value turns a knob, a YAML file is a method of your own. Images are decoded
in turn, A B C A B C, under the same noise and conditions, so that a drifting machine hits all methods alike. Writes
OUT/report.html, images.jsonl (a line an image; the table is made from it) and the parts beside; repeat it to resume.
"""

import json
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from tqdm import tqdm

from data.sets import BUILT_IN, open_set
from eval.classifier import load_classifier
from eval.efficiency import Comparison as Timed
from eval.efficiency import bootstrap_ratio, compare, peak_tensor_bytes
from eval.evaluation import open_reference
from eval.features import FeatureNetwork
from eval.files import write_json
from eval.networks import open_network
from eval.pixels import to_uint8
from eval.speculation import (
    CallCost,
    ChiSquare,
    ImageRecord,
    MethodFacts,
    Quality,
    SweepPoint,
    call_costs,
    chi_square,
    judged,
    overhead,
    read_records,
    summary,
    write_records,
)
from eval.speculation_page import Comparison, comparison_page
from generators.next_token import NextToken
from layers.checkpoint import read_tensors
from layers.noise import Noise
from layers.packed import pack_linears
from layers.spec import Condition
from sampling.speculative import check
from sampling.speculative.drafting import EagleDrafter, ModelDrafter
from training.call_cost import calls, drafter_step
from training.decoder import Decoder, add_decoder_arguments, open_decoder
from training.options import command_line
from training.run import RunError, load_drafter, load_run, versions
from training.samplers import Contestant, Models, Recipe, SamplerError, chosen, positions_of, recipes

SHOWN = 10  # pictures of a row of the page
WIDEST = 4096  # codes beyond which the one-step law is computed at fewer places
PLACES = 1000
EXACT_DRAWS = 20_000


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add_decoder_arguments(made)
    made.add_argument("--report", type=Path, required=True, help="Folder to write.")
    made.add_argument(
        "--samplers",
        type=str,
        nargs="+",
        default=None,
        help=f"Of {', '.join(recipes())}, with settings as gsd:half=3; or YAML files. Default: all that the models allow. "
        "ar, plain decoding, is always the first.",
    )
    made.add_argument("--draft-run", type=str | None, default=None, help="Run of a smaller generator, which drafts.")
    made.add_argument("--drafter-run", type=str | None, default=None, help="Run of scripts/train_drafter.py.")
    made.add_argument("--images", type=int, default=30, help="Images of each method that are timed one by one.")
    made.add_argument(
        "--seconds", type=float, default=60.0, help="At most so much timing of a method; never below 5 images."
    )
    made.add_argument("--warmup", type=int, default=3, help="Images of each method before any is timed.")
    made.add_argument("--num", type=int, default=500, help="Images of each method that quality is measured on.")
    made.add_argument(
        "--batch-sizes", type=int, nargs="*", default=[4, 16], help="Batches that throughput is measured at."
    )
    made.add_argument("--batch-size", type=int, default=100, help="Images decoded together where quality is measured.")
    made.add_argument("--sweeps", type=bool, default=True, help="Turn the knobs of lossy methods.")
    made.add_argument(
        "--classifier", type=Path | None, default=None, help="Weights of a classifier, for label accuracy."
    )
    made.add_argument(
        "--reference", type=str | None, default=None, help="Real pictures: a built-in set, npz or folder."
    )
    made.add_argument(
        "--text-features", type=str | None, default=None, help="safetensors with text (N, S, D), text_mask."
    )
    made.add_argument("--threads", type=int | None, default=None, help="Of PyTorch on the CPU.")
    made.add_argument("--device", type=str | None, default=None, help="Default: the GPU where there is one.")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    cli = parser()
    options = cli.parse_args(arguments)
    if (options.run is None) == (options.published is None):
        cli.error("give --run FOLDER or --published NAME")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    decoder = open_decoder(cli, arguments, device)
    bench = Bench(decoder, options, device)
    made = bench.page()
    print(f"{options.report / 'report.html'}: {len(made.facts)} methods, {made.baseline.images} images each")
    for name, row in made.summaries.items():
        speed = "unstable" if made.unstable else f"{row.speedup.value:.2f}x"
        clock = f", processor {made.processor[name]:.2f}x"
        print(f"{name:14s} {row.calls:6.1f} calls, {row.fewer_calls:5.2f}x fewer; clock {speed}{clock}")


class Bench:
    """One model, its drafts and its methods, and everything that is measured of them. Parts that are done are in files."""

    def __init__(self, decoder: Decoder, options: Namespace, device: torch.device) -> None:
        self.decoder, self.options, self.device = decoder, options, device
        self.out: Path = options.report
        self.models = models_of(decoder, options, device)
        self.contestants = contestants_of(self.models, options.samplers)
        self.text = None if options.text_features is None else Condition(**read_tensors(options.text_features))
        self.network = network_of(options, device)
        self.head = {
            "commit": commit(),
            "versions": versions(),
            "methods": {it.name: asdict(it.recipe) for it in self.contestants},
            **decoder.settings,
            "draft_run": options.draft_run,
            "drafter_run": options.drafter_run,
            "images": options.images,
            "num": options.num,
            "threads": torch.get_num_threads(),
        }

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """What is in OUT/NAME.json, or what `make` says, which is then put there.

        Raises SamplerError where the file was made for another comparison.
        """
        file = self.out / f"{name}.json"
        same = json.loads(json.dumps({key: value for key, value in self.head.items() if key != "commit"}))
        if file.is_file():
            found = json.loads(file.read_text())
            if found["head"] != same:
                raise SamplerError(f"{file}: belongs to a comparison of other settings; choose another --report")
            return found["value"]
        print(f"{name} ...", flush=True)
        value = make()
        write_json(file, {"head": same, "value": value})
        return json.loads(file.read_text())["value"]

    def condition(self, index: Tensor) -> Condition:
        """Of the images with these numbers, the same for every method: classes spread over all, or captions in turn."""
        if self.text is not None:
            return self.text.select(index % self.text.rows)
        classes = self.decoder.num_classes
        return Condition(label=index * max(1, classes // self.options.num) % classes)

    # ---- measurements

    def costs(self) -> dict[str, Any]:
        """Seconds of a call over L positions of the target, and of a step of what drafts."""
        models, kinds = self.models, {it.recipe.drafter for it in self.contestants}
        one = self.condition(torch.arange(1)).to(self.device)
        found = call_costs(calls(models.target, one, models.sampler), self.device)
        steps = {}
        if "model" in kinds:
            length = 1 if isinstance(models.target, NextToken) else models.target.spec.length // models.target.rounds
            steps["model"] = call_costs(calls(models.draft, one, models.sampler, (length,)), self.device).at(length)
        if "eagle" in kinds:
            steps["eagle"] = call_costs({(0, 1): drafter_step(models)}, self.device).at(1)
        with torch.inference_mode():
            tokens = self.contestants[0].decode(torch.arange(1), one).tokens
            pixels = call_costs({(0, 1): lambda: self.decoder.tokenizer.decode(tokens)}, self.device).at(1)
        return {"seconds": found.seconds, "steps": steps, "pixels": pixels}

    def timing(self) -> dict[str, Any]:
        """Images one by one, all methods in turn; writes images.jsonl."""
        runners = [Runner(self, contestant) for contestant in self.contestants]
        timed = self.timed(runners, 1, self.options.images, self.options.seconds)
        records = [record for runner in runners for record in runner.records(timed)]
        write_records(self.out / "images.jsonl", records, {**self.head, "timing": timed.record()["conditions"]})
        return {"unstable": list(timed.unstable), "conditions": timed.record()["conditions"]}

    def timed(self, runners: Sequence["Runner"], size: int, runs: int, seconds: float) -> Timed:
        works = {runner.contestant.name: runner for runner in runners}
        options = self.options
        return compare(works, self.device, options.dtype, size, runs, options.warmup, seconds)

    def batches(self) -> dict[str, Any]:
        """Images a second and rounds of the last image, by method and batch size."""
        found: dict[str, Any] = {it.name: {"throughput": {}, "last_round": {}} for it in self.contestants}
        for size in self.options.batch_sizes:
            runners = [Runner(self, contestant) for contestant in self.contestants]
            timed = self.timed(runners, size, runs=5, seconds=self.options.seconds)
            for runner in runners:
                entry = found[runner.contestant.name]
                entry["throughput"][size] = timed.timings[runner.contestant.name].images_per_second
                entry["last_round"][size] = sum(int(it.rounds.max()) for _, it in runner.made) / len(runner.made)
        for contestant in self.contestants:
            work = Runner(self, contestant)
            found[contestant.name]["peak_bytes"] = peak_tensor_bytes(lambda work=work: work(1), self.device)
        return found

    def quality(self) -> dict[str, Any]:
        """Of every method on the same conditions, beside plain decoding under other noise."""
        ar, seed = self.contestants[0], self.models.seed
        found = {
            contestant.name: asdict(self.judge(self.seen(contestant, seed)))
            for contestant in tqdm(self.contestants, desc="quality", unit="method")
        }
        others = [self.judge(self.seen(ar, other)).distance for other in (seed + 2, seed + 3)]
        return {"methods": found, "floor": [found[ar.name]["distance"], *others]}

    def sweeps(self) -> list[dict[str, Any]]:
        """Lossy methods at every setting of their knob: calls, time, quality."""
        ar = self.contestants[0]
        turned = [
            (contestant, key, value)
            for contestant in self.contestants
            for key, values in contestant.recipe.sweep.items()
            for value in values
        ]
        if not turned:
            return []
        runners = [Runner(self, ar)]
        runners += [Runner(self, Contestant(it.recipe.turned(key, value), self.models)) for it, key, value in turned]
        timed = self.timed(runners, 1, max(5, self.options.images // 3), self.options.seconds / 3)
        plain, *rest = [self.clock(timed.timings[runner.contestant.name]) for runner in runners]
        calls, *others = [sum(it.calls for _, it in runner.made) for runner in runners]
        points = []
        for (contestant, key, value), runner, seconds, count in zip(turned, runners[1:], rest, others, strict=True):
            quality = self.judge(self.seen(runner.contestant, self.models.seed))
            speed = bootstrap_ratio(plain, seconds).value
            points.append(asdict(SweepPoint(contestant.name, key, value, calls / count, speed, quality)))
        return points

    def clock(self, timing: Any) -> Sequence[float]:
        """Seconds that ratios are taken of where others share the machine: of the processor, on a CPU."""
        return timing.processor if self.device.type == "cpu" else timing.wall

    def exactness(self) -> dict[str, Any]:
        """Exact methods against the enumerated law of a small model; the one-step law of others on laws met here."""
        found: dict[str, Any] = {}
        for contestant in tqdm(self.contestants, desc="exactness", unit="method"):
            method, entry = contestant.method, {"test": None, "step_tv": None}
            if isinstance(self.models.target, NextToken) and method is not None:
                if contestant.exactness == "exact":
                    entry["test"] = asdict(small_test(contestant.recipe, method))
                else:
                    entry["step_tv"] = self.step_tv(contestant)
            found[contestant.name] = entry
        return found

    def step_tv(self, contestant: Contestant) -> float:
        """Of a chain or window the first place of each draft, of a tree the nodes below its root."""
        part, recorder = (
            ("tree", check.RecordedTree) if hasattr(contestant.method, "tree") else ("rule", check.Recorded)
        )
        recorded = recorder(getattr(contestant.method, part))
        watched = Contestant(contestant.recipe, self.models)
        watched.method = replace(contestant.method, **{part: recorded})
        for index in torch.arange(128).split(32):
            watched.decode(index, self.condition(index))
        width = recorded.seen[0][0].shape[-1]
        places = PLACES if width <= WIDEST else max(1, PLACES * WIDEST**2 // width**2 // 16)
        if part == "tree":
            return check.tree_step_distance(recorded, contestant.method.relaxation, places)
        return check.step_distance(recorded, self.models.target, places)

    # ---- pictures

    @torch.inference_mode()
    def pictures(self, contestant: Contestant, index: Tensor, seed: int) -> Tensor:
        tokens = contestant.decode(index, self.condition(index), seed).tokens
        return self.decoder.tokenizer.decode(tokens)

    def seen(self, contestant: Contestant, seed: int) -> dict[str, Tensor]:
        """What the network says of `num` pictures: outputs by name."""
        parts = [
            self.extract(self.pictures(contestant, index, seed))
            for index in torch.arange(self.options.num).split(self.options.batch_size)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.inference_mode()
    def extract(self, images: Tensor) -> dict[str, Tensor]:
        pictures = images if images.dtype == torch.uint8 else to_uint8(images)
        return {name: value.cpu() for name, value in self.network.extract(pictures.to(self.device)).items()}

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """Plain decoding under other noise than that of the methods."""
        return self.seen(self.contestants[0], self.models.seed + 1)

    @cached_property
    def reference(self) -> Tensor | None:
        """Features of the real pictures, all of them."""
        name = self.options.reference
        if name is None:
            return None
        layer = self.network.record.layer
        if name in BUILT_IN:
            pictures = open_set(name, split="val", size=self.decoder.tokenizer.spec.decoded[1])
            batches: Iterable[Tensor] = (
                torch.stack([pictures[i]["image"] for i in part]) for part in parts(len(pictures))
            )
        else:
            batches = open_reference(name).pictures.batches(100)
        return torch.cat([self.extract(batch)[layer] for batch in batches])

    def judge(self, own: dict[str, Tensor]) -> Quality:
        label = self.condition(torch.arange(self.options.num)).label
        return judged(self.network.record.layer, own, self.base, self.reference, label)

    # ---- the page

    def page(self) -> Comparison:
        """Everything that is not there yet, then the page of it."""
        self.out.mkdir(parents=True, exist_ok=True)
        costs = self.part("costs", self.costs)
        timing = self.part("timing", self.timing)
        batches = self.part("batches", self.batches)
        quality = self.part("quality", self.quality)
        exactness = self.part("exactness", self.exactness)
        sweeps = self.part("sweeps", self.sweeps) if self.options.sweeps else []
        _, records = read_records(self.out / "images.jsonl")
        of = {it.name: [record for record in records if record.method == it.name] for it in self.contestants}
        baseline = of[self.contestants[0].name]
        cost = CallCost({int(c): {int(n): s for n, s in curve.items()} for c, curve in costs["seconds"].items()})
        facts = {it.name: self.facts(it, batches, quality, exactness) for it in self.contestants}
        found = Comparison(
            title=f"Decoding methods on {self.options.run or self.options.published}",
            conditions=self.conditions(timing),
            facts=facts,
            summaries={name: summary(rows, baseline) for name, rows in of.items()},
            unstable=timing["unstable"],
            processor={
                name: bootstrap_ratio([it.processor for it in baseline], [it.processor for it in rows]).value
                for name, rows in of.items()
            },
            cost=cost,
            draft_steps=costs["steps"],
            overheads={
                name: overhead(rows, cost, costs["steps"].get(facts[name].drafter, 0.0)) for name, rows in of.items()
            },
            positions={name: mean([n for it in rows for n in it.positions]) for name, rows in of.items()},
            floor=quality["floor"],
            distance=f"{self.network.record.distance}@{self.options.num}",
            decoder_seconds=costs["pixels"],
            sweeps=[SweepPoint(**{**point, "quality": Quality(**point["quality"])}) for point in sweeps],
        )
        index = torch.arange(min(SHOWN, self.options.num))
        rows = {it.name: self.pictures(it, index, self.models.seed).cpu() for it in self.contestants}
        comparison_page(found, rows).save(self.out / "report.html")
        return found

    def facts(self, contestant: Contestant, batches: Any, quality: Any, exactness: Any) -> MethodFacts:
        name, recipe = contestant.name, contestant.recipe
        test = exactness[name]["test"]
        extra = (
            0 if recipe.drafter is None else sum(p.numel() for p in self.models.network(recipe.drafter).parameters())
        )
        speed = {
            key: {int(size): rate for size, rate in batches[name][key].items()} for key in ("throughput", "last_round")
        }
        return MethodFacts(
            method=name,
            about=recipe.about,
            exactness=contestant.exactness,
            knob=recipe.knob,
            drafter=recipe.drafter,
            control=recipe.control,
            test=None if test is None else ChiSquare(**test),
            step_tv=exactness[name]["step_tv"],
            quality=Quality(**quality["methods"][name]),
            peak_bytes=batches[name]["peak_bytes"],
            extra_parameters=extra,
            **speed,
        )

    def conditions(self, timing: Any) -> dict[str, Any]:
        told = {key: value for key, value in self.head.items() if key not in ("methods", "versions")}
        target = sum(p.numel() for p in self.models.target.parameters())
        return {
            **told,
            "parameters of the target": f"{target:,}",
            "tokens": self.decoder.tokenizer.spec.length,
            "features": f"{self.network.record.name}, {self.network.record.layer}, weights "
            f"{self.network.record.weights_sha256[:12]}; {self.options.num} pictures, classes in turn",
            "timed": "the token loop with its prefill, batch 1, after warm-up; without the pixel decoder",
            **timing["conditions"],
        }


class Runner:
    """A method as the clock takes it: decodes the next images, and remembers what that took."""

    def __init__(self, bench: Bench, contestant: Contestant) -> None:
        self.bench, self.contestant, self.next = bench, contestant, 0
        self.made: list[tuple[Tensor, Any]] = []  # numbers of the images, and what was decoded
        self.positions: list[list[int]] = []

    def __call__(self, size: int) -> int:
        index = torch.arange(self.next, self.next + size)
        self.next += size
        trunk = getattr(self.contestant.generator, "trunk", None)
        if trunk is None:
            decoded, read = self.contestant.decode(index, self.bench.condition(index)), None
        else:
            with positions_of(trunk) as read:
                decoded = self.contestant.decode(index, self.bench.condition(index))
        self.made.append((index, decoded))
        self.positions.append(decoded.committed[0].tolist() if read is None else list(read))
        return decoded.calls

    def records(self, timed: Timed) -> list[ImageRecord]:
        """Of the images that were timed, the last ones made."""
        timing, name = timed.timings[self.contestant.name], self.contestant.name
        count = len(timing.wall)
        rows = zip(self.made[-count:], self.positions[-count:], timing.wall, timing.processor, strict=True)
        found = []
        for (index, it), positions, wall, processor in rows:
            condition = self.bench.condition(index).label
            found.append(
                ImageRecord(
                    method=name,
                    image=int(index),
                    seed=self.bench.models.seed,
                    condition=int(index if condition is None else condition),
                    tokens=tuple(it.tokens[0].tolist()) if it.tokens.dim() == 2 else (0,) * it.tokens.shape[1],
                    calls=it.calls,
                    positions=tuple(positions),
                    drafter_calls=it.drafter_calls,
                    committed=tuple(it.committed[0].tolist()),
                    undrafted=self.contestant.undrafted,
                    tested=tuple(it.tested.tolist()),
                    accepted=tuple(it.accepted.tolist()),
                    seconds=wall,
                    processor=processor,
                )
            )
        return found


# ---- what is compared


def models_of(decoder: Decoder, options: Namespace, device: torch.device) -> Models:
    """Raises RunError for drafts of other tokens, or a drafter of another target."""
    draft = drafter = None
    if options.draft_run is not None:
        draft = load_run(options.draft_run, device).generator
        if draft is None or draft.spec != decoder.generator.spec:
            raise RunError(f"--draft-run {options.draft_run}: no generator of the same tokens as the target")
    if options.drafter_run is not None:
        if options.run is None:
            raise RunError("--drafter-run: a drafter belongs to one run; give that as --run")
        drafter = load_drafter(options.drafter_run, load_run(options.run), device)
    for network in filter(None, (draft, drafter)):
        network.to(getattr(torch, options.dtype))
        if device.type == "cpu":
            pack_linears(network)
    codebook = decoder.tokenizer.codebook() if hasattr(decoder.tokenizer, "codebook") else None
    return Models(decoder.generator, decoder.sampler, decoder.seed, device, draft, drafter, codebook)


def contestants_of(models: Models, words: Sequence[str] | None) -> list[Contestant]:
    """Those that were asked for, or all that these models can run. Raises SamplerError where one cannot."""
    if words is not None:
        words = [part for word in words for part in word.split(",")]
        return [Contestant(chosen(word), models) for word in dict.fromkeys(["ar", *words])]
    discrete = models.target.spec.vocab_size is not None
    have = {
        None,
        *(kind for kind, network in (("model", models.draft), ("eagle", models.drafter)) if network is not None),
    }
    found = []
    for recipe in [chosen("ar"), *(it for name, it in recipes().items() if name != "ar")]:
        continuous = recipe.method is not None and recipe.method["class_path"] == "ContinuousSpeculation"
        fits = recipe.method is None or continuous != discrete
        filters = "top_k" in recipe.sampler.get("filter", {})
        needed = {recipe.drafter, "model" if recipe.model == "draft" else None}
        if fits and needed <= have and (discrete or not filters):
            found.append(Contestant(recipe, models))
    order = ("exact", "bounded", "biased")
    return found[:1] + sorted(found[1:], key=lambda it: (it.recipe.control, order.index(it.exactness)))


def network_of(options: Namespace, device: torch.device) -> FeatureNetwork:
    if options.classifier is not None:
        return load_classifier(options.classifier, device).network()
    return open_network("rc512", device, {})


def small_test(recipe: Recipe, method: Any) -> ChiSquare:
    """The method on the small model, drafted for by small models."""
    target = check.small_generator(0)
    drafting = {
        None: None,
        "model": ModelDrafter(check.small_generator(1)),
        "eagle": EagleDrafter(check.small_drafter(2, target)),
    }[recipe.drafter]

    def decode(generator: NextToken, condition: Condition, sampler: Any, noise: Noise) -> Tensor:
        return method.generate(generator, condition, sampler, noise, drafting)[0].tokens

    counts = check.sequence_counts(decode, target, 1, EXACT_DRAWS)
    return chi_square(counts.tolist(), check.sequence_law(target, 1).tolist())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def parts(count: int) -> Iterable[list[int]]:
    return (part.tolist() for part in torch.arange(count).split(100))


def commit() -> str:
    """Of the checkout this runs in, marked where files differ from it."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "not in a git checkout"
    return told.stdout.strip()


if __name__ == "__main__":
    command_line(main)
