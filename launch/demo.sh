#!/usr/bin/env bash
# The whole way at a small size: draw street scenes, train a segmenter to evaluate with and SRUNIT, evaluate, translate a folder
# of images, say where everything is.
# Run it through `make demo`, which sets up the environment first. The same run again continues or shows what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/demo
segmenter=runs/demo-segmenter

python -m launch.runs.embedded   # draws data/demo, trains $segmenter on scenes of its own
deepspeed launch/train.py --task gta2city --data data/demo --config launch/demo.yaml --run-dir "$run" \
    --evaluation.segmenter "$segmenter" --evaluation.every 1
python launch/evaluate.py "$run" --segmenter "$segmenter"

# A folder of images, which here are the test scenes: a shard is a plain tar file.
mkdir -p "$run/scenes"
tar -xf data/demo/test/source/000000.tar -C "$run/scenes" --exclude '*.label.png' --exclude '*.json'
python launch/translate.py "$run" "$run/scenes" "$run/translated"

newest=$(ls -td "$run"/checkpoints/step_* | head -n 1)
cat <<END

pictures     $run/samples/        (source | translation | another target image, every 200 steps)
             $run/samples/evaluation.png     (source | translation | the same scene in the target look)
             $run/samples/worst_images.png   (where the segmenter sees other classes than there are)
             $run/samples/flips.png          (which classes were turned into which)
translations $run/translated/     (of $run/scenes/)
metrics      $run/evaluation.json, $run/metrics.jsonl
checkpoint   $newest
MLflow       make ui   (or: source .venv/bin/activate && mlflow ui --backend-store-uri sqlite:///mlflow.db)

use it       python launch/translate.py $run PHOTOS TRANSLATED        (images of any size, a folder of them, prepared data)
             python launch/export.py $run --to onnx --out demo.onnx   (for programs without PyTorch)
             python launch/serve.py $run --port 8000                  (a page and an address that translate)
END
