"""Real video: clips of small self-driving cars, and which way their view pans (docs/real.md).

    python -m experiments.driving recordings/ --val chahed21 --test JustinWit --out driving

recordings/ has a folder for each recording, in which, at any depth, there are folders of frames
whose names begin with a number, or videos. They are cut into clips of 16 frames. Written are
clips.csv, all clips but those of the test recordings, to pretrain on; and pan.csv, the clips in
which the picture clearly moves to the left or to the right, each of them forwards and backwards:
played backwards, a clip shows the same frames and moves the other way, so that no single frame
reveals the label. With --remove-mean each clip's mean frame is subtracted from it.
"""

import argparse
import csv
import os
import re
import shutil
import sys
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from video.decode import IMAGES, DataError, describe, read_clip
from video.listing import MEDIA

FRAMES = 16
CLEAR = 1 / 160  # of the picture's width per frame


def find_clips(recording, bad):
    """Yield clips, (16, H, W, 3) uint8: of images with successive numbers, and of videos.

    Why files could not be read is appended to `bad`.
    """
    def read(paths, start=None):
        try:
            return [np.concatenate([read_clip(path, 1, 1) for path in paths]) if start is None else
                    read_clip(*paths, FRAMES, 1, start)]
        except (DataError, ValueError) as error:  # ValueError: images of different sizes
            bad.append(str(error))
            return []

    for folder, subfolders, names in os.walk(recording):
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        images = {int(number[0]): os.path.join(folder, name) for name in names
                  if name.lower().endswith(IMAGES) and (number := re.findall(r"^\d+", name))}
        numbers, start = sorted(images), 0
        while start + FRAMES <= len(numbers):
            part = numbers[start:start + FRAMES]
            if whole := part[-1] - part[0] == FRAMES - 1:  # no frame is missing
                yield from read([images[number] for number in part])
            start += FRAMES if whole else 1
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.lower().endswith(MEDIA) and not name.lower().endswith(IMAGES):
                try:
                    length = describe(path)[-1]
                except DataError as error:
                    bad.append(str(error))
                    continue
                for start in range(0, length - FRAMES + 1, FRAMES):
                    yield from read([path], start)


def measure_shift(clip, reach=10):
    """How far the picture moves to the right, in widths per frame: (T, H, W, 3) uint8 -> float.

    For each pair of successive frames, at a width of 160 to 319 pixels or less, the shift by at
    most `reach` pixels that makes them most alike, averaged.
    """
    gray = clip.mean(3, dtype=np.float32)
    gray = gray[..., ::max(1, gray.shape[2] // 160)]
    shifts, width = np.arange(-reach, reach + 1), gray.shape[2]
    differences = [abs(gray[1:, :, max(0, s):width + min(0, s)]
                       - gray[:-1, :, max(0, -s):width + min(0, -s)]).mean((1, 2)) for s in shifts]
    return shifts[np.argmin(differences, axis=0)].mean() / width


def remove_mean(clip):
    """Twice the difference from the clip's mean frame, on grey: what stands still disappears."""
    clip = clip.astype(np.float32)
    return (128 + 2 * (clip - clip.mean(0))).round().clip(0, 255).astype(np.uint8)


def write_video(path, clip):
    """(T, H, W, 3) uint8, of even height and width -> a video file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"crf": "18"})
        stream.height, stream.width = clip.shape[1:3]
        for frame in np.ascontiguousarray(clip):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def write_list(file, header, rows):
    with open(file, "w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


def main(arguments=None):
    """Write the clips and lists that the command line asks for. Raises DataError, OSError."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, help="a folder for each recording")
    parser.add_argument("--val", nargs="*", default=[], help="recordings to choose settings on")
    parser.add_argument("--test", nargs="*", default=[], help="recordings to test on")
    parser.add_argument("--remove-mean", action="store_true",
                        help="subtract its mean frame from each clip, so that motion remains")
    parser.add_argument("--out", type=Path, default=Path("driving"), help="a new folder")
    args = parser.parse_args(arguments)

    recordings = sorted(path.name for path in args.recordings.iterdir() if path.is_dir())
    if unknown := sorted({*args.val, *args.test}.difference(recordings)):
        raise DataError(f"{args.recordings}: no recording named {', '.join(unknown)}")
    if args.out.exists():
        raise DataError(f"{args.out} exists: pass another --out, or delete it")
    temporary = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    clips, pans, bad = [], [], []  # rows of the lists; why files could not be read
    for recording in tqdm(recordings, disable=None):
        split = ("test" if recording in args.test else "val" if recording in args.val else "train")
        for clip in find_clips(args.recordings / recording, bad):
            clip = clip[:, :clip.shape[1] // 2 * 2, :clip.shape[2] // 2 * 2]  # for the encoder
            shift = measure_shift(clip)
            if args.remove_mean:
                clip = remove_mean(clip)
            name = f"{len(clips):05}.mp4"
            write_video(temporary / name, clip)
            clips.append([name, recording, split])
            if abs(shift) > CLEAR:
                write_video(temporary / f"backwards-{name}", clip[::-1])
                ways = ("right", "left") if shift > 0 else ("left", "right")
                pans += [[name, ways[0], recording, split],
                         [f"backwards-{name}", ways[1], recording, split]]
        if not clips or clips[-1][1] != recording:
            print(f"{recording}: no {FRAMES} successive frames were found", file=sys.stderr)

    if bad:
        print(f"left out: {len(bad)} files that cannot be read, the first: {bad[0]}",
              file=sys.stderr)
    if not clips:
        raise DataError(f"{args.recordings}: no clips: each recording needs a folder with frames "
                        "whose names begin with a number, or with videos")
    write_list(temporary / "clips.csv", ["path", "group"],
               [row[:2] for row in clips if row[2] != "test"])
    write_list(temporary / "pan.csv", ["path", "label", "group", "split"], pans)
    os.replace(temporary, args.out)
    print(f"written to {args.out}/: {len(clips)} clips, {len(pans) // 2} of them pan clearly")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
