#!/usr/bin/env bash
# The whole way at a small size: draw street scenes, train SRUNIT on them, evaluate, say where everything is.
# Run it through `make demo`, which sets up the environment first. The same run again continues or shows what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/demo

python launch/prepare.py street-scenes --count 400 --test-count 40 --size 192x96 --out data/demo
deepspeed launch/train.py --task gta2city --data data/demo --config launch/demo.yaml --run-dir "$run"
python launch/evaluate.py "$run"

newest=$(ls -td "$run"/checkpoints/step_* | head -n 1)
cat <<END

pictures     $run/samples/        (source | translation | another target image, every 200 steps)
             $run/samples/evaluation.png   (source | translation | the same scene in the target look)
figures      $run/evaluation.json, $run/metrics.jsonl
checkpoint   $newest
MLflow       make ui   (or: source .venv/bin/activate && mlflow ui --backend-store-uri sqlite:///mlflow.db)
END
