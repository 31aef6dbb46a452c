#!/usr/bin/env bash
# The whole way at a small size: draw street scenes, train a segmenter to evaluate with and SRUNIT, evaluate, say where
# everything is.
# Run it through `make demo`, which sets up the environment first. The same run again continues or shows what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/demo
segmenter=runs/demo-segmenter

python -m launch.runs.embedded   # draws data/demo, trains $segmenter on scenes of its own
deepspeed launch/train.py --task gta2city --data data/demo --config launch/demo.yaml --run-dir "$run" \
    --evaluation.segmenter "$segmenter" --evaluation.every 1
python launch/evaluate.py "$run" --segmenter "$segmenter"

newest=$(ls -td "$run"/checkpoints/step_* | head -n 1)
cat <<END

pictures     $run/samples/        (source | translation | another target image, every 200 steps)
             $run/samples/evaluation.png     (source | translation | the same scene in the target look)
             $run/samples/worst_images.png   (where the segmenter sees other classes than there are)
             $run/samples/flips.png          (which classes were turned into which)
metrics      $run/evaluation.json, $run/metrics.jsonl
checkpoint   $newest
MLflow       make ui   (or: source .venv/bin/activate && mlflow ui --backend-store-uri sqlite:///mlflow.db)
END
