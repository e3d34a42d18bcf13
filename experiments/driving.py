"""Real video: clips of small self-driving cars, and which way their view pans (docs/real.md).

    python -m experiments.driving recordings/ --val chahed21 --test JustinWit --out driving

recordings/ has a folder for each recording, with videos or folders of numbered frames in it, at any
depth. They are cut into clips of 16 frames. Written are clips.csv, all clips but those of the test
recordings, to pretrain on; and pan.csv, the clips in which the picture clearly moves to the left or
to the right, each of them forwards and backwards: played backwards, a clip shows the same frames
and moves the other way, so that no single frame reveals the label.
"""

import argparse
import csv
import sys
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from video.decode import DataError, describe, read_clip
from video.listing import load_entries, with_labels

FRAMES = 16
CLEAR = 1 / 160  # of the picture's width per frame


def measure_shift(clip, reach=10):
    """How far the picture moves to the right, in widths per frame: (T, H, W, 3) uint8 -> float.

    For each pair of successive frames, the shift by at most `reach` pixels that makes them most
    alike, averaged.
    """
    gray, width = clip.mean(3, dtype=np.float32), clip.shape[2]
    shifts = np.arange(-reach, reach + 1)
    differences = [abs(gray[1:, :, max(0, s):width + min(0, s)]
                       - gray[:-1, :, max(0, -s):width + min(0, -s)]).mean((1, 2)) for s in shifts]
    return shifts[np.argmin(differences, axis=0)].mean() / width


def write_video(path, clip):
    """(T, H, W, 3) uint8, of even height and width -> a video file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"crf": "18"})
        stream.height, stream.width = clip.shape[1:3]
        for frame in np.ascontiguousarray(clip):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def main(arguments=None):
    """Write the clips and lists that the command line asks for. Raises DataError, OSError."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, help="a folder for each recording")
    parser.add_argument("--val", nargs="*", default=[], help="recordings to choose settings on")
    parser.add_argument("--test", nargs="*", default=[], help="recordings to test on")
    parser.add_argument("--out", type=Path, default=Path("driving"), help="a new folder")
    args = parser.parse_args(arguments)

    entries = sorted(with_labels(load_entries([str(args.recordings)])))
    held_out = {name: "val" for name in args.val} | {name: "test" for name in args.test}
    if unknown := sorted(held_out.keys() - {entry.label for entry in entries}):
        raise DataError(f"{args.recordings}: no recording named {', '.join(unknown)}")
    args.out.mkdir()
    clips, pans, short = [], [], []  # rows of the lists; sources without a clip
    for entry in tqdm(entries, disable=None):
        split, length = held_out.get(entry.label, "train"), describe(entry.path)[-1]
        short += [entry.path] if length < FRAMES else []
        for start in range(0, length - FRAMES + 1, FRAMES):
            clip, name = read_clip(entry.path, FRAMES, 1, start), f"{len(clips):05}.mp4"
            clip = clip[:, :clip.shape[1] // 2 * 2, :clip.shape[2] // 2 * 2]  # for the encoder
            write_video(args.out / name, clip)
            clips.append([name, entry.label, split])
            shift = measure_shift(clip)
            if abs(shift) > CLEAR:
                write_video(args.out / f"backwards-{name}", clip[::-1])
                ways = ("right", "left") if shift > 0 else ("left", "right")
                pans += [[name, ways[0], entry.label, split],
                         [f"backwards-{name}", ways[1], entry.label, split]]

    for name, header, rows in (
            ("clips.csv", ["path", "group"], [row[:2] for row in clips if row[2] != "test"]),
            ("pan.csv", ["path", "label", "group", "split"], pans)):
        with open(args.out / name, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    print(f"written to {args.out}/: {len(clips)} clips, {len(pans) // 2} of them pan clearly")
    if short:
        print(f"left out: {len(short)} files or folders with fewer than {FRAMES} frames, the first "
              f"is {short[0]}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
