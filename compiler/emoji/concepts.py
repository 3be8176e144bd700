"""Writes the concept files of the emoji world from its names: ``python -m erasec.emoji.concepts``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import tomli_w

from erasec.checkpoint.safetensors import atomic_write
from erasec.emoji.judge import far_objects
from erasec.emoji.words import ARTISTS, CLUSTERS, OBJECTS, SCENES, members, neighbours
from erasec.emoji.world import CHOICES, PREPOSITIONS, article

# Objects of other clusters whose meaning a concept file keeps.
FAR = 8
OBJECT_TEMPLATES = (
    "{}",
    "a {}",
    "a drawing of a {}",
    "a picture of a {}",
    "an image of a {}",
    "an icon of a {}",
    "a sticker of a {}",
    "a cartoon of a {}",
    *(f"a {{}} by {artist}" for artist in ARTISTS),
    *(f"a drawing of a {{}} in the style of {artist}" for artist in ARTISTS),
    "a {} on white",
    "a {} on a green background",
)
STYLE_TEMPLATES = (
    "a drawing by {}",
    "a picture in the style of {}",
    "an icon in {} style",
    *(f"{article(name)} by {{}}" for name in far_objects("", 10)),
    *(f"a drawing of {article(name)} in the style of {{}}" for name in far_objects("", 7)),
)


def implicit_prompts(name: str) -> list[str]:
    """Captions that imply an object without its name, those with the fewest other objects first.

    Of the nouns of a cluster, the first that does not contain the name: "car on wheels" names the car.
    """
    item = OBJECTS[name]
    captions = []
    for cluster, scene in CHOICES:
        if cluster == item.cluster and scene in item.scenes:
            noun = next(noun for noun in CLUSTERS[cluster] if name not in noun.split())
            captions.append((len(members(scene, cluster)), f"{article(noun)} {SCENES[scene][0]}"))
    for scene in item.scenes:
        phrase = SCENES[scene][0]
        prefix = "something " if phrase.split()[0] in PREPOSITIONS else ""
        captions.append((len(members(scene)), prefix + phrase))
    return [text for _, text in sorted(captions)]


def object_concept(name: str) -> dict[str, Any]:
    """The content of the concept file of an object.

    The anchor is the first neighbour; where it is erased as well, another one or the noun of the cluster takes its
    place. Every second neighbour is kept, and so the others show what an edit costs.
    """
    item, close = OBJECTS[name], neighbours(name)
    noun = next(noun for noun in CLUSTERS[item.cluster] if name not in noun.split())
    kept = [word for other in close[::2] for word in OBJECTS[other].names]
    return {
        "name": name,
        "kind": "object",
        "erase": [name],
        "synonyms": list(item.synonyms),
        "anchor": close[0],
        "fallback": [*close[1:], noun],
        "implicit": implicit_prompts(name),
        "keep": [*kept, *far_objects(name, FAR), *ARTISTS],
        "templates": list(OBJECT_TEMPLATES),
        "notes": f'Of the emoji world. "keep" holds every second neighbour ({", ".join(close[::2])}) and objects that '
        f"are unlike it; {', '.join(close[1::2]) or 'no neighbour'} is left out to show what an edit costs.",
    }


def style_concept(artist: str) -> dict[str, Any]:
    """The content of the concept file of an artist. The anchor is another artist, because "a drawing" is by any."""
    others = [other for other in ARTISTS if other != artist]
    return {
        "name": f"the style of {artist}",
        "kind": "style",
        "label": artist,
        "erase": [artist],
        "anchor": others[0],
        "keep": others[:2],
        "templates": list(STYLE_TEMPLATES),
        "notes": f'Of the emoji world. "keep" holds {others[0]} and {others[1]} of the other artists; {others[2]} is '
        "left out to show what an edit costs.",
    }


def concepts() -> dict[str, dict[str, Any]]:
    """The content of every concept file by file name."""
    objects = {name.replace(" ", "-"): object_concept(name) for name in OBJECTS}
    return objects | {f"the-style-of-{artist.lower()}": style_concept(artist) for artist in ARTISTS}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m erasec.emoji.concepts", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the files, compiler/recipe/concepts/worlds/emoji"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for stem, content in concepts().items():
        with atomic_write(options.out / f"{stem}.toml") as temporary:
            temporary.write_text(tomli_w.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
