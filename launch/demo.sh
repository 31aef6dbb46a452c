#!/usr/bin/env bash
# The whole way at a small size: draw street scenes, train a segmenter to judge by and SRUNIT, evaluate, say where
# everything is.
# Run it through `make demo`, which sets up the environment first. The same run again continues or shows what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/demo
judge=runs/demo-segmenter

# The segmenter learns from scenes of its own, as full of sky as of trees.
python launch/prepare.py street-scenes --count 800 --test-count 40 --size 192x96 --mismatch 0.5 --out data/demo-segmenter
deepspeed launch/train_segmenter.py --data data/demo-segmenter --config launch/demo-segmenter.yaml --run-dir "$judge"
python launch/prepare.py street-scenes --count 400 --test-count 40 --size 192x96 --out data/demo
deepspeed launch/train.py --task gta2city --data data/demo --config launch/demo.yaml --run-dir "$run" \
    --evaluation.segmenter "$judge" --evaluation.every 1
python launch/evaluate.py "$run" --segmenter "$judge"

newest=$(ls -td "$run"/checkpoints/step_* | head -n 1)
cat <<END

pictures     $run/samples/        (source | translation | another target image, every 200 steps)
             $run/samples/evaluation.png     (source | translation | the same scene in the target look)
             $run/samples/worst_images.png   (where the segmenter sees other classes than there are)
             $run/samples/flips.png          (which classes were turned into which)
figures      $run/evaluation.json, $run/metrics.jsonl
checkpoint   $newest
MLflow       make ui   (or: source .venv/bin/activate && mlflow ui --backend-store-uri sqlite:///mlflow.db)
END
