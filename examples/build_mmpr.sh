#!/usr/bin/env bash
# From questions to preference pairs: sample, judge, pair, continue without the image, check, look.
#
#   MODEL=Qwen/Qwen2.5-VL-7B-Instruct QUESTIONS=questions.jsonl IMAGE_ROOT=images OUT=mmpr bash examples/build_mmpr.sh
#
# Stopped at any moment, the same command goes on where it was. Questions are JSON lines: id, images (paths below
# IMAGE_ROOT), question, answer (null where it is not known), source.
#
# SERVERS   OpenAI-compatible servers that have MODEL, as a list: '[http://node1:8000/v1, http://node2:8000/v1]'.
#           On each machine: vllm serve "$MODEL" --port 8000 --limit-mm-per-prompt '{"image": 4}'
#           Without any the model runs in this process.
# WORKERS   Processes for the steps that need no model (default 4); on Ray: RAY=auto (see examples/ray_cluster.md).
# PROMPT    How questions are asked: final_answer (default), boxed, think, direct, or a .jinja file.
# RESPONSES Responses per question (paper: up to 32).
# TOKENS    Longest response, in tokens.
set -euo pipefail

: "${MODEL:?name the model: MODEL=...}" "${QUESTIONS:?name the questions: QUESTIONS=...jsonl}" "${OUT:?name a folder: OUT=...}"
IMAGE_ROOT=${IMAGE_ROOT:-.} SERVERS=${SERVERS:-[]} WORKERS=${WORKERS:-4} RAY=${RAY:-null}
PROMPT=${PROMPT:-final_answer} RESPONSES=${RESPONSES:-32} TOKENS=${TOKENS:-4096}

asking=(--model "$MODEL" --tokenizer "$MODEL" --server "$SERVERS" --image_root "$IMAGE_ROOT" --max_new_tokens "$TOKENS")
working=(--workers "$WORKERS" --ray "$RAY")

mpo sample --questions "$QUESTIONS" --prompt "$PROMPT" --num_responses "$RESPONSES" "${asking[@]}" --output "$OUT/responses"

# questions with an answer: right against wrong
mpo judge --responses "$OUT/responses" "${working[@]}" --output "$OUT/verdicts"
mpo pair --verdicts "$OUT/verdicts" "${working[@]}" --output "$OUT/pairs"

# questions without one: the response against its first half, continued without the image
mpo dropout-ntp --responses "$OUT/responses" "${asking[@]}" --output "$OUT/dropout_ntp"

mpo report --verdicts "$OUT/verdicts" --pairs "[$OUT/pairs, $OUT/dropout_ntp]" --image_root "$IMAGE_ROOT" --output "$OUT"
