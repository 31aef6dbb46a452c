"""Prepare a data set: images are resized once and written as WebDataset shards, to a folder or to S3."""

import argparse
import os

from infra.disk import local_path
from infra.errors import UserError, exits_cleanly
from infra.storage import open_storage
from pipelines.distributions import CHART
from pipelines.images import parse_size
from pipelines.inspection import describe, describe_matches, verify
from pipelines.manifest import load_manifest
from pipelines.prepare import FOLDER_SIZE, PAINTING_SIZE, STREET_SIZE, Encoding, prepare
from pipelines.shards import IMAGE_FORMATS
from pipelines.sources.base import Source
from pipelines.sources.drawn import SOURCE_LAYOUT, change_layout, mismatched, painted_street, street_scenes
from pipelines.sources.driving import CITYSCAPES_DOMAINS, cityscapes, gta5
from pipelines.sources.mismatch import Mismatch, unmatched_labels, unmatched_maps
from pipelines.sources.photos import DIRECTIONS, LETTERS, folders, paired, single_images

EXAMPLES = """examples:
  python launch/prepare.py street-scenes --count 400 --out data/streets
  python launch/prepare.py folders horse2zebra --out s3://bucket/horse2zebra
  python launch/prepare.py folders afhq --domains cat dog --size 286x286 --out data/cat2dog
  python launch/prepare.py paired maps --direction BtoA --mismatch --out data/map2photo
  python launch/prepare.py images monet.jpg photo.jpg --limit 1024 --out data/monet
  python launch/prepare.py gta5 GTA5 --cityscapes Cityscapes --leave-out-mismatched --out data/gta2city
  python launch/prepare.py folders horse2zebra --out s3://bucket/horse2zebra --address head:6379
  python launch/prepare.py match data/gta2city --by segmenter runs/source-segmenter
  python launch/prepare.py inspect data/gta2city

Run the same command again to continue a preparation that was interrupted. S3 takes its endpoint and credentials
from the usual variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION)."""

MATCH = "find target crops that are like each source crop, for --data.match of launch/train.py"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "prepare.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", metavar="SOURCE", required=True)

    def add(name: str, help: str, size: tuple[int, int] | None, directory: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        if directory:
            command.add_argument("directory", type=local_path, metavar="DIR")
        option = command.add_argument
        option("--out", required=True, metavar="ROOT", help="a folder or s3://bucket/prefix")
        if size:
            option(
                "--size", metavar="WxH", default="{}x{}".format(*size), help="of every image in pixels [%(default)s]"
            )
        option("--format", choices=IMAGE_FORMATS, default="jpg", help="png is lossless [%(default)s]")
        option("--quality", type=int, default=95, metavar="N", help="of JPEG, 1 to 100 [%(default)s]")
        option("--shard-size", type=int, default=256, metavar="N", help="samples in one shard [%(default)s]")
        option("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes, a shard each [%(default)s]")
        option("--address", metavar="HOST:PORT", help="of a Ray cluster's head, or auto: its machines make the shards; "
               "all of them see DIR and ROOT [this machine, without Ray]")  # fmt: skip
        return command

    scenes = add("street-scenes", "procedural street scenes with exact labels; needs no data", STREET_SIZE, False)
    scenes.add_argument(
        "--count", type=int, default=400, metavar="N", help="training scenes of each domain [%(default)s]"
    )
    scenes.add_argument(
        "--test-count", type=int, default=40, metavar="N", help="test scenes, in both looks [%(default)s]"
    )
    scenes.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another seed draws other worlds [%(default)s]"
    )
    scenes.add_argument(
        "--mismatch", type=float, default=1.0, metavar="X",
        help="how much more vegetation and less sky the target has, from 0 (the source's layout) to 1 [%(default)s]",
    )  # fmt: skip
    layout_help = "change layout statistics, for example street_trees=0.5 floors=2,6"
    scenes.add_argument("--source-layout", nargs="+", default=[], metavar="FIELD=VALUE", help=layout_help)
    scenes.add_argument("--target-layout", nargs="+", default=[], metavar="FIELD=VALUE", help=layout_help)

    two = add(
        "folders", "two folders of images: trainA and trainB (testA, testB), or train/NAME (test/, val/)", FOLDER_SIZE
    )
    two.add_argument(
        "--domains", nargs=2, default=LETTERS, metavar=("SOURCE", "TARGET"),
        help="what the folders are called, as in trainNAME or train/NAME [A B]",
    )  # fmt: skip

    single = add(
        "images", "one image of each domain, for sincut: SOURCE is translated into the look of TARGET", None, False
    )
    single.add_argument("source_image", type=local_path, metavar="SOURCE")
    single.add_argument("target_image", type=local_path, metavar="TARGET")
    single.add_argument(
        "--limit", type=int, metavar="N", help="pixels of the longer side: larger images are made smaller [no limit]"
    )

    pair = add(
        "painting",
        "a street as a painting (source) and as a photo (target), for sincut; needs no data",
        PAINTING_SIZE,
        False,
    )
    pair.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another seed draws another street [%(default)s]"
    )

    city = add("cityscapes", "Cityscapes, leftImg8bit and gtFine: train for training, val for testing", STREET_SIZE)
    domain_help = "side of the photographs; label2city: both sides, label colours to photographs [%(default)s]"
    city.add_argument("--domain", choices=CITYSCAPES_DOMAINS, default="label2city", help=domain_help)
    add_mismatch(city, "label2city: sources from one cluster of label statistics, targets from the other")

    game = add("gta5", "GTA5, images and labels, as the source; with --cityscapes the whole of gta2city", STREET_SIZE)
    game.add_argument("--cityscapes", type=local_path, metavar="DIR", help="Cityscapes becomes the target")
    held_out_help = "test images, those with the smallest SHA-256 of the file's stem [%(default)s]"
    game.add_argument("--held-out", type=int, default=500, metavar="N", help=held_out_help)
    game.add_argument("--leave-out-mismatched", action="store_true", help="skip frames whose label has another size")

    pairs = add(
        "paired", "images A and B side by side in one file (maps, facades): train, and test or val", FOLDER_SIZE
    )
    pairs.add_argument("--direction", choices=DIRECTIONS, default="AtoB", help="A is the left half [%(default)s]")
    pairs.add_argument(
        "--distinct", action="store_true", help="night2day: an image that is part of many pairs is trained on once"
    )
    add_mismatch(pairs, "maps (B): maps from one cluster of grey levels, photos from the other, a tenth mixed")

    match = commands.add_parser("match", help=MATCH, description=MATCH)
    option = match.add_argument
    option("root", metavar="ROOT", help="a folder or s3://bucket/prefix")
    option(
        "--by", nargs="+", required=True, metavar=("WAY", "RUN"),
        help="what crops are compared in: 'segmenter RUN' (classes that a segmenter sees; RUN is a run folder of "
        "launch/train_segmenter.py or what --evaluation.segmenter takes), 'labels' (true classes), or 'thumbnail' (8x8 "
        "colours and edges)",
    )  # fmt: skip
    option("--grid", metavar="WxH", help="squares of a crop in which classes are counted [4x4]")
    option("--k", type=int, default=10, metavar="N", help="target crops kept for each source crop [%(default)s]")
    option(
        "--crop",
        default="256",
        metavar="N",
        help="side of the crops, as of the training; none: the whole image [%(default)s]",
    )
    option("--name", metavar="NAME", help="for --data.match [the way]")
    option(
        "--mirror", action=argparse.BooleanOptionalAction, default=True, help="mirrored target crops count too [yes]"
    )
    option("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that read images [%(default)s]")

    look = commands.add_parser("inspect", help="show what a prepared data set holds and verify every hash")
    look.add_argument("root", metavar="ROOT", help="a folder or s3://bucket/prefix")
    return top


def add_mismatch(command: argparse.ArgumentParser, help: str) -> None:
    command.add_argument("--mismatch", action="store_true", help=f"{help} (SRUNIT, Appendix C)")
    command.add_argument(
        "--add-opposite", type=float, metavar="X", help="with --mismatch: add X %% of the opposite cluster (Appendix D)"
    )
    command.add_argument(
        "--seed", type=int, metavar="N", help="with --mismatch: of the clusters and of what is mixed [0]"
    )


def mismatch_of(args: argparse.Namespace) -> Mismatch | None:
    """What --mismatch asks for; None without it."""
    if not args.mismatch and (args.add_opposite is not None or args.seed is not None):
        raise UserError("--add-opposite and --seed change what --mismatch does: add it, or leave them out")
    return Mismatch(args.seed or 0, args.add_opposite or 0.0) if args.mismatch else None


def source_of(args: argparse.Namespace) -> Source:
    match args.command:
        case "street-scenes":
            layouts = (
                change_layout(SOURCE_LAYOUT, args.source_layout),
                change_layout(mismatched(args.mismatch), args.target_layout),
            )
            return street_scenes(args.count, args.test_count, args.seed, *layouts)
        case "folders":
            return folders(args.directory, tuple(args.domains))
        case "images":
            return single_images(args.source_image, args.target_image, args.limit)
        case "painting":
            return painted_street(args.seed)
        case "cityscapes":
            mismatch = mismatch_of(args)
            if mismatch and args.domain != "label2city":
                raise UserError("--mismatch splits pairs in two: leave it out, or give --domain label2city")
            source = cityscapes(args.directory, args.domain)
            return unmatched_labels(source, mismatch) if mismatch else source
        case "gta5":
            return gta5(args.directory, args.cityscapes, args.held_out, args.leave_out_mismatched)
        case _:
            mismatch = mismatch_of(args)
            if mismatch and args.distinct:
                raise UserError("--mismatch splits pairs in two and --distinct takes them apart: leave out one of them")
            source = paired(args.directory, args.direction, args.distinct)
            maps = "target" if args.direction == "AtoB" else "source"
            return unmatched_maps(source, maps, mismatch) if mismatch else source


def _make_absolute(args: argparse.Namespace) -> None:
    """Paths of input mean the same where another process works in another folder."""
    for name in ("directory", "cityscapes", "source_image", "target_image"):
        if path := getattr(args, name, None):
            setattr(args, name, path.absolute())


@exits_cleanly
def main() -> None:
    args = parser().parse_args()
    if args.command == "inspect":
        storage = open_storage(args.root)
        manifest = load_manifest(storage)
        print(describe(manifest))
        if storage.list(CHART):
            print(f"\nthe same as a chart: {storage.url}/{CHART}")
        verify(storage, manifest)
        print("every shard is complete and unchanged")
        for line in describe_matches(storage, manifest):
            print(line)
    elif args.command == "match":
        from launch.matching import match  # brings torch, a second or two

        crop = None if args.crop == "none" else args.crop
        match(
            args.root,
            args.by,
            grid=args.grid,
            k=args.k,
            crop=crop,
            name=args.name,
            mirror=args.mirror,
            workers=args.workers,
        )
    else:
        if args.address:
            _make_absolute(args)
        size = parse_size(args.size) if "size" in args else None
        encoding = Encoding(size, args.format, args.quality, args.shard_size)
        manifest = prepare(source_of(args), open_storage(args.out), encoding, args.workers, address=args.address)
        print(f"{sum(split.samples for split in manifest.splits.values())} images at {args.out}")


if __name__ == "__main__":
    main()
