#!/usr/bin/env bash
# The whole way at a small size: draw street scenes, train a segmenter to evaluate with, train a translator that keeps the meaning
# and plain CUT, evaluate both, translate a folder of images, say where everything is.
# Run it through `make demo`, which sets up the environment first. The same run again continues or shows what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/demo
plain=runs/demo-cut
judge=runs/demo-segmenter
helper=runs/demo-source-segmenter
data=data/demo

python -m launch.runs.embedded   # draws $data, trains $judge on scenes of its own

# What keeps the meaning (docs/flipping.md): a segmenter of the labelled sources; target crops of a like layout; a loss by which that
# segmenter is to see the source's classes in the translation; and a mask, so that D sees only where both have the same class.
python launch/train_segmenter.py --data $data --domain source --jitter 1 --class-weights 0.5 --run-dir $helper \
    --model.output-stride 8 --model.width 0.5 --precision fp32 --optim.epochs 12
python launch/prepare.py match $data --by segmenter $helper --crop 96 --name layout
deepspeed launch/train.py --task gta2city --data $data --config launch/demo.yaml --run-dir $run --data.match layout \
    --method.semantic.segmenter $helper --method.semantic.weight 1 --method.semantic.jitter 0.5 --method.semantic.mask true \
    --evaluation.segmenter $judge --evaluation.every 1
python launch/train.py --task gta2city --data $data --config launch/demo.yaml --run-dir $plain
python launch/evaluate.py $run --beside $plain --segmenter $judge

# A folder of images, which here are the test scenes: a shard is a plain tar file.
mkdir -p $run/scenes
tar -xf $data/test/source/000000.tar -C $run/scenes --exclude '*.label.png' --exclude '*.json'
python launch/translate.py $run $run/scenes $run/translated

newest=$(ls -td $run/checkpoints/step_* | head -n 1)
cat <<END

pictures     $run/samples/        (source | translation | another target image, every 300 steps)
             $run/samples/evaluation.png     (source | translation | CUT's translation | the same scene in the target look)
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
