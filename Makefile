# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One thread for each of the two test processes: more of either only makes them wait for each other.
PYTEST_ARGS ?= -n 2 --dist loadfile
PHOTOS ?= examples/photos/*.jpg
check_dirs := src tests examples benchmarks docs .ci

.PHONY: help demo reproduce photos presets answers criteria measure engines test lowest newest soak style cards quality docs \
	dist clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# The stamp is named after the extra that it stands for, and is older than pyproject.toml when that changes.
$(VENV)/%.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up $(VENV) with the extra '$*' (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

demo: $(VENV)/timm.installed ## Caption the bundled photos with the small checkpoint
	$(BIN)/mue-hf caption $(PHOTOS)

# Each step is done once: what is there is kept, and an interrupted stage goes on from its last checkpoint.
REPRODUCED ?= runs/reproduce
THREADS ?= 2
# For another model than `make reproduce` makes; see benchmarks/compare_training.py.
LAYERS ?= 3
STAGE_ARGS ?= $(LESSON_ARGS)
STAGE = OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/train_scenes.py --output_dir $(@D) \
	--use_cpu --native_bf16 --adam_beta2 0.98 --save_steps 100 --save_total_limit 1 --logging_steps 50 --report_to none \
	--per_device_eval_batch_size 64
READING = --freeze_trunk --learning_rate 2e-3 --muon_learning_rate 6e-3 --weight_decay 0.01 --warmup_steps 100 \
	--ema_decay 0.995 --per_device_train_batch_size 16

reproduce: $(REPRODUCED)/table.md ## Draw scenes, train a small model, calibrate, evaluate, tables and plots (an hour)
	@cat $<

$(REPRODUCED)/scenes: | $(VENV)/dev.installed
	$(BIN)/python -c 'from mue_hf.data.scenes import write_scenes; write_scenes("$@", {"dev": 400, "test": 150})'
	@touch $@

$(REPRODUCED)/classification/report.json: | $(VENV)/dev.installed
	$(STAGE) --stage classification --max_steps 450 --learning_rate 3e-3 --warmup_steps 80 --lr_scheduler_type cosine \
		--per_device_train_batch_size 32

# The stages of examples/train_scenes.py: each starts from the one before, with scenes of its own.
CAPTIONING = $(STAGE) $(READING) --stage captioning --lr_scheduler_type constant_with_warmup $(STAGE_ARGS)
RELATIONS = $(CAPTIONING) --start_from $(<D) --layers $(LAYERS) --caption_share 0 --captions_per_image 1 --kinds relation

$(REPRODUCED)/captioning/report.json: $(REPRODUCED)/classification/report.json
	$(CAPTIONING) --max_steps 1000 --trunk_from $(<D) --layers $(LAYERS) --caption_share 0.25 \
		--kinds existence counting relation --relations "left of"

$(REPRODUCED)/left/report.json: $(REPRODUCED)/captioning/report.json
	$(RELATIONS) --max_steps 600 --first_scene 100000 --relations "left of"

$(REPRODUCED)/sides/report.json: $(REPRODUCED)/left/report.json
	$(RELATIONS) --max_steps 300 --first_scene 200000 --relations "left of" "right of"

$(REPRODUCED)/above/report.json: $(REPRODUCED)/sides/report.json
	$(RELATIONS) --max_steps 500 --first_scene 300000 --relations "left of" "right of" above

$(REPRODUCED)/relations/report.json: $(REPRODUCED)/above/report.json
	$(RELATIONS) --max_steps 600 --first_scene 400000

$(REPRODUCED)/all/report.json: $(REPRODUCED)/relations/report.json
	$(CAPTIONING) --max_steps 1000 --start_from $(<D) --layers 6 --caption_share 0.1 --captions_per_image 1 \
		--first_scene 500000

$(REPRODUCED)/entailment/report.json: $(REPRODUCED)/all/report.json
	$(STAGE) $(READING) --stage entailment --max_steps 800 --start_from $(<D) --first_scene 1000000 \
		--lr_scheduler_type cosine --random_exit_depth --self_distillation 1

CALIBRATE = $(BIN)/mue-hf calibrate --task entailment --data $(REPRODUCED)/scenes/entailment.jsonl --batch-size 64 \
	--criterion similarity confidence --threads $(THREADS) --runs $(REPRODUCED)/calibration
# Where no preset keeps the budget (exit code 1), the table goes without it.
$(REPRODUCED)/calibrated: $(REPRODUCED)/entailment/report.json $(REPRODUCED)/scenes
	$(CALIBRATE) $(<D) --budget 0.05 --preset quality || test $$? = 1
	$(CALIBRATE) $(<D) --compute 0.6 --preset balanced || test $$? = 1
	@touch $@

$(REPRODUCED)/table.md: $(REPRODUCED)/calibrated
	$(BIN)/mue-hf evaluate entailment --model $(REPRODUCED)/entailment --data $(REPRODUCED)/scenes/entailment.jsonl \
		--kind-column kind --batch-size 64 --sweep all --thresholds-split dev --num-thresholds 4 --oracle --time-rows 10 \
		--threads $(THREADS) \
		$$(grep -oE '"(quality|balanced)": [{]' $(REPRODUCED)/entailment/generation_config.json | sed 's/"\(.*\)".*/--preset \1/') \
		--output $(REPRODUCED)/points.jsonl --plots $(REPRODUCED)/plots --table $@

# The stages of examples/train_photos.py: each starts from the ones before, an interrupted one goes on from its last
# checkpoint. `make -j2 photos` gives each of two runs that are averaged a core; `long` and `rewarded` have two processes.
FLICKR8K ?= data/flickr8k
COCO ?= data/coco_small
PHOTOS_RUN ?= runs/photos
PHOTOS_SCRIPT = examples/train_photos.py --output_dir $(@D) \
	--captions $(FLICKR8K)/captions.jsonl $(COCO)/captions.jsonl --texts $(COCO)/captions_without_images.jsonl \
	--leave_out images/2851198725_37b6027625.jpg --cache_dir $(PHOTOS_RUN)/features \
	--use_cpu --bf16 --per_device_train_batch_size 64 --adam_beta2 0.98 \
	--weight_decay 0.01 --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.1}' \
	--label_smoothing_factor 0.1 --random_exit_depth --save_steps 50 --save_total_limit 2 \
	--report_to none --logging_steps 20
PHOTOS_TRAIN = OMP_NUM_THREADS=1 $(BIN)/python $(PHOTOS_SCRIPT)
PHOTOS_BOTH = OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2 $(PHOTOS_SCRIPT) --ddp_backend gloo
PHOTOS_RATES = --learning_rate 1e-3 --muon_learning_rate 5e-3
LAST_LAYER = --layer_weights 0 0 0 0 0 1 --intermediate_token_share 0.1
ALL_LAYERS = --layer_weights 0.1 0.1 0.1 0.1 0.1 1 --intermediate_token_share 0.4 --self_distillation 1
STATEMENTS = --pairs $(FLICKR8K)/entailment.jsonl --made_statements 6 --ema_decay 0.99 --warmup_steps 30

# The first stage decides the sizes, e.g. PHOTOS_SIZES="--d_model 320 --ffn_dim 640 --heads 5".
$(PHOTOS_RUN)/words/model.safetensors: | $(VENV)/dev.installed
	$(PHOTOS_TRAIN) $(PHOTOS_SIZES) $(PHOTOS_RATES) $(LAST_LAYER) --max_steps 400 --warmup_steps 60 --shares 0 0 1

$(PHOTOS_RUN)/captions/model.safetensors: $(PHOTOS_RUN)/words/model.safetensors
	$(PHOTOS_TRAIN) $(PHOTOS_RATES) $(LAST_LAYER) --start_from $(<D) --max_steps 500 --warmup_steps 60 \
		--shares 0.5 0.35 0.15 --ema_decay 0.99

$(PHOTOS_RUN)/mixed-%/model.safetensors: $(PHOTOS_RUN)/captions/model.safetensors
	$(PHOTOS_TRAIN) $(PHOTOS_RATES) $(LAST_LAYER) $(STATEMENTS) --start_from $(<D) --seed $* --max_steps 470 \
		--shares 0.34 0.26 0.08 0.1 0.22

AGREE = $(PHOTOS_TRAIN) $(STATEMENTS) --start_from $(^D) --max_steps 400 --shares 0.42 0.32 0.05 0.07 0.14 \
	--learning_rate 3e-4 --muon_learning_rate 1.5e-3 $(ALL_LAYERS)
MIXED = $(PHOTOS_RUN)/mixed-1/model.safetensors $(PHOTOS_RUN)/mixed-2/model.safetensors

$(PHOTOS_RUN)/mixed/model.safetensors: $(MIXED)
	$(PHOTOS_TRAIN) --start_from $(^D) --max_steps 0

$(PHOTOS_RUN)/agree-5/model.safetensors: $(PHOTOS_RUN)/mixed/model.safetensors
	$(AGREE) --seed 5 --encoder_agreement 0.3

$(PHOTOS_RUN)/agree-6/model.safetensors: $(PHOTOS_RUN)/mixed/model.safetensors
	$(AGREE) --seed 6 --encoder_agreement 1

AGREED = $(PHOTOS_RUN)/agree-5/model.safetensors $(PHOTOS_RUN)/agree-6/model.safetensors

$(PHOTOS_RUN)/agree/model.safetensors: $(AGREED)
	$(PHOTOS_TRAIN) --start_from $(^D) --max_steps 0

$(PHOTOS_RUN)/long/model.safetensors: $(PHOTOS_RUN)/agree/model.safetensors
	$(PHOTOS_BOTH) --start_from $(<D) --max_steps 720 --warmup_steps 30 --shares 0.44 0.34 0.06 0.04 0.12 \
		--pairs $(FLICKR8K)/entailment.jsonl --made_statements 8 --made_kinds object caption --statements_per_image 3 \
		--learning_rate 4e-4 --muon_learning_rate 1.75e-3 --ema_decay 0.99 $(ALL_LAYERS) \
		--lr_scheduler_kwargs '{"min_lr_rate": 0.05}'

$(PHOTOS_RUN)/rewarded/model.safetensors: $(PHOTOS_RUN)/long/model.safetensors
	$(PHOTOS_BOTH) --start_from $(<D) --shares 0.65 0.35 0 --warmup_steps 5 --captions_per_image 5 --max_steps 200 \
		--per_device_train_batch_size 32 --scst_samples 5 --label_smoothing_factor 0 --learning_rate 4e-5 \
		--layer_weights 0 0 0 0 0 1 --intermediate_token_share 0.4 --self_distillation 1 --ema_decay 0.97 \
		--lr_scheduler_kwargs '{"min_lr_rate": 0.2}'

# Statements want a stage of their own, the easiest kind first; full depth and the last layer alone.
JUDGE = $(PHOTOS_TRAIN) --start_from $(<D) --made_statements 8 --statements_per_image 4 --warmup_steps 20 \
	--per_device_train_batch_size 32 --dropout 0.05 --label_smoothing_factor 0 --random_exit_depth False \
	--layer_weights 0 0 0 0 0 1
ALL_KINDS = --made_kinds object caption colour place count

$(PHOTOS_RUN)/matched/model.safetensors: $(PHOTOS_RUN)/rewarded/model.safetensors
	$(JUDGE) --made_kinds caption --shares 0 0 0 1 --max_steps 200 --ema_decay 0.97 \
		--learning_rate 4e-4 --muon_learning_rate 2e-3

JUDGED = $(JUDGE) $(ALL_KINDS) --ema_decay 0.98 --learning_rate 2e-4 --muon_learning_rate 1e-3
$(PHOTOS_RUN)/judged-1/model.safetensors: $(PHOTOS_RUN)/matched/model.safetensors
	$(JUDGED) --shares 0.18 0.14 0 0.68 --max_steps 400

$(PHOTOS_RUN)/judged-2/model.safetensors: $(PHOTOS_RUN)/matched/model.safetensors
	$(JUDGED) --shares 0.25 0.2 0 0.55 --max_steps 300 --seed 7

JUDGED_BOTH = $(PHOTOS_RUN)/judged-1/model.safetensors $(PHOTOS_RUN)/judged-2/model.safetensors
$(PHOTOS_RUN)/judged/model.safetensors: $(JUDGED_BOTH)
	$(PHOTOS_TRAIN) --start_from $(^D) --max_steps 0

$(PHOTOS_RUN)/last-%/model.safetensors: $(PHOTOS_RUN)/judged/model.safetensors
	$(PHOTOS_TRAIN) --start_from $(<D) --seed $* --made_statements 8 --statements_per_image 4 $(ALL_KINDS) \
		--shares 0.4 0.26 0 0.34 --max_steps 240 --per_device_train_batch_size 32 --warmup_steps 15 --dropout 0.1 \
		--learning_rate 2e-4 --muon_learning_rate 1e-3 --ema_decay 0.98 $(ALL_LAYERS) --label_smoothing_factor 0.05 \
		--lr_scheduler_kwargs '{"min_lr_rate": 0.05}'

LAST = $(PHOTOS_RUN)/last-11/model.safetensors $(PHOTOS_RUN)/last-12/model.safetensors
$(PHOTOS_RUN)/last/model.safetensors: $(LAST) $(PHOTOS_RUN)/judged/model.safetensors
	$(PHOTOS_TRAIN) --start_from $(^D) --max_steps 0

# Layers that write the same captions: the whole model's own ones are among what all layers learn.
OWN = $(PHOTOS_TRAIN) --start_from $(<D) --own_captions 5 --crops 0 --pairs $(FLICKR8K)/entailment.jsonl \
	--made_statements 8 --statements_per_image 4 $(ALL_KINDS) --shares 0.42 0.26 0 0.06 0.26 --max_steps 160 \
	--warmup_steps 8 --learning_rate 2e-4 --muon_learning_rate 1e-3 --ema_decay 0.97 --self_distillation 1 \
	--label_smoothing_factor 0

$(PHOTOS_RUN)/own-21/model.safetensors: $(PHOTOS_RUN)/last/model.safetensors
	$(OWN) --seed 21 --captions_per_image 3 --dropout 0.08 --layer_weights 0.4 0.4 0.4 0.4 0.4 1 \
		--intermediate_token_share 0.5

$(PHOTOS_RUN)/own-22/model.safetensors: $(PHOTOS_RUN)/last/model.safetensors
	$(OWN) --seed 22 --captions_per_image 2 --dropout 0.05 --layer_weights 0.6 0.6 0.6 0.6 0.6 1 \
		--intermediate_token_share 0.7

OWNS = $(PHOTOS_RUN)/own-21/model.safetensors $(PHOTOS_RUN)/own-22/model.safetensors
$(PHOTOS_RUN)/photos/model.safetensors: $(OWNS) $(PHOTOS_RUN)/last/model.safetensors
	$(PHOTOS_TRAIN) --start_from $(^D) --max_steps 0

photos: $(PHOTOS_RUN)/photos/model.safetensors ## Train the captioner of photos (hours; needs FLICKR8K= and COCO=)

# What model_cards/mue-photos-small.md and docs/results.md show; a record that exists is kept.
MEASURED ?= runs/measured
PHOTOS_SMALL = checkpoints/mue-photos-small
SETS = $(MEASURED)/sets
MEASURE = $(BIN)/mue-hf evaluate $(1) --model $(PHOTOS_SMALL) --threads $(THREADS) --output $@
# `quality` is for greedy decoding.
PRESETS = --preset balanced --preset fast

$(SETS)/dev.jsonl: examples/photo_sets.py | $(VENV)/dev.installed
	$(BIN)/python examples/photo_sets.py $(@D) flickr8k=$(FLICKR8K)/captions.jsonl coco=$(COCO)/captions.jsonl

# One after the other: each writes into the checkpoint's generation config.
CALIBRATE_PHOTOS = $(BIN)/mue-hf calibrate $(PHOTOS_SMALL) --task captioning --data $(SETS)/dev.jsonl \
	--threads $(THREADS) --runs $(MEASURED)/calibration
# Three tenths of the dev images fit and search, the others certify. The encoder runs whole where few captions may change.
ABOUT_OUTPUTS = $(CALIBRATE_PHOTOS) --criterion agreement --kv exact --streams decoder \
	--num-thresholds 12 --objective calls
ABOUT_SCORES = $(CALIBRATE_PHOTOS) --per-layer --risk metric
presets: $(SETS)/dev.jsonl ## Calibrate the presets of the captioner of photos (a quarter of an hour)
	$(ABOUT_OUTPUTS) --num-beams 1 --budget 0.05 --preset quality
	$(ABOUT_SCORES) --compute 0.75 --preset balanced
	$(ABOUT_SCORES) --compute 0.68 --preset fast

# Statements about generated scenes: a fifth of them searches, 1,120 scenes certify. The image stream runs whole: a last
# layer less of it changes six answers in a thousand.
CALIBRATE_SCENES = $(BIN)/mue-hf calibrate checkpoints/mue-scenes-small --task entailment --data scenes:0:1400 \
	--split dev --batch-size 64 --criterion agreement --streams text decoder --encoder-depths --per-layer \
	--num-thresholds 5 --search-share 0.2 --objective calls --method betting \
	--threads $(THREADS) --runs $(MEASURED)/calibration
# The second is the safest setting with 58 % of the layer calls, whose bound is within 1 %: one test in place of four.
answers: | $(VENV)/dev.installed ## Calibrate presets of the judge of scenes that change few answers
	$(CALIBRATE_SCENES) --budget 0.005 --candidates 4 --preset answers-0.5
	$(CALIBRATE_SCENES) --compute 0.58 --candidates 1 --preset answers-1

# Every criterion of the decoder, with exact keys and values and looks at the candidate tokens alone. "agreement" goes by
# the fit of a preset, so `presets` and `answers` come first.
CRITERIA = --generate exit_kv=exact --thresholds-split dev --num-thresholds 3 --oracle --threads $(THREADS) \
	--sweep confidence=0.5,0.7,0.9 --sweep margin=0.3,0.5,0.8 --sweep entropy=0.3,0.1,0.05 \
	--sweep patience=1,2,3 --sweep agreement=0.8,0.9,0.95,0.98,0.99,0.995 --sweep similarity-decoder \
	--sweep docs/measurements/decoder-depths.points.json --shuffled-depths "agreement 0.95, exit_kv exact" \
	--output $@ --table docs/measurements/$(basename $(@F)).md --plots docs/measurements/$(basename $(@F))
criteria: $(MEASURED)/photos-decoder.jsonl $(MEASURED)/scenes-decoder.jsonl ## Compare the criteria (a quarter of an hour)

$(SETS)/flickr8k.jsonl: $(SETS)/dev.jsonl
	cat $(SETS)/flickr8k-dev.jsonl $(SETS)/flickr8k-test.jsonl > $@
$(MEASURED)/photos-decoder.jsonl: $(SETS)/flickr8k.jsonl
	$(BIN)/mue-hf evaluate captioning --model $(PHOTOS_SMALL) --data $< --limit 250 --num-beams 1 \
		--batch-size 32 --metrics cider --time-rows 5 --time-repeats 2 $(CRITERIA)
$(MEASURED)/scenes-decoder.jsonl: | $(VENV)/dev.installed
	$(BIN)/mue-hf evaluate entailment --model checkpoints/mue-scenes-small --data scenes:0:150 --kind-column kind \
		--batch-size 64 --time-rows 24 --time-repeats 2 $(CRITERIA)

$(MEASURED)/%-beams.jsonl: $(SETS)/dev.jsonl
	$(call MEASURE,captioning) --data $(SETS)/$*-test.jsonl --table docs/measurements/photos-$*-beams.md $(PRESETS) \
		--sweep docs/measurements/photos-image.points.json

$(MEASURED)/%-greedy.jsonl: $(SETS)/dev.jsonl
	$(call MEASURE,captioning) --data $(SETS)/$*-test.jsonl --table docs/measurements/photos-$*-greedy.md \
		--num-beams 1 --time-rows 0 --batch-size 32 --sweep docs/measurements/photos-depths.points.json --preset quality

MADE_STATEMENTS = $(call MEASURE,entailment) --data $(SETS)/$*-statements.jsonl --kind-column about --time-rows 0 \
	--batch-size 32 --words-baseline $(SETS)/flickr8k-statements.jsonl $(SETS)/coco-statements.jsonl
SNLI_STATEMENTS = $(call MEASURE,entailment) --data $(FLICKR8K)/entailment.jsonl --no-premise --time-rows 0 \
	--batch-size 32 --words-baseline $(FLICKR8K)/entailment.jsonl
$(MEASURED)/snli-own.jsonl: $(SETS)/dev.jsonl
	$(SNLI_STATEMENTS) --preset balanced --preset fast
$(MEASURED)/snli-shuffled.jsonl: $(SETS)/dev.jsonl
	$(SNLI_STATEMENTS) --images shuffled
$(MEASURED)/snli-none.jsonl: $(SETS)/dev.jsonl
	$(SNLI_STATEMENTS) --images none
$(MEASURED)/%-own.jsonl: $(SETS)/dev.jsonl
	$(MADE_STATEMENTS)
$(MEASURED)/%-shuffled.jsonl: $(SETS)/dev.jsonl
	$(MADE_STATEMENTS) --images shuffled
$(MEASURED)/%-none.jsonl: $(SETS)/dev.jsonl
	$(MADE_STATEMENTS) --images none

BENCH = $(BIN)/mue-hf bench --model $(PHOTOS_SMALL) --images $(PHOTOS) --threads $(THREADS) --batch-sizes
docs/measurements/small.md: | $(VENV)/dev.installed
	$(BENCH) 1 16 --beams 1 5 --variants stock lossless enabled --preset balanced --preset fast --repeats 5 \
		--output $(MEASURED)/speed-small.json --table $@ --plots docs/measurements/small
docs/measurements/overhead-small.md: | $(VENV)/dev.installed
	$(BENCH) 1 --beams 1 5 --variants lossless enabled enabled-confidence enabled-margin enabled-agreement \
		--repeats 15 --output $(MEASURED)/overhead-small.json --table $@

CAPTION_RECORDS = $(foreach set,flickr8k coco,$(MEASURED)/$(set)-beams.jsonl $(MEASURED)/$(set)-greedy.jsonl)
STATEMENT_RECORDS = $(foreach set,flickr8k coco snli,$(foreach kind,own shuffled none,$(MEASURED)/$(set)-$(kind).jsonl))
SMALL_TABLES = docs/measurements/small.md docs/measurements/overhead-small.md
measure: $(SMALL_TABLES) $(CAPTION_RECORDS) $(STATEMENT_RECORDS) ## Score the captioner of photos: card, tables, picture
	$(BIN)/mue-hf caption examples/photos/*.jpg --json --model $(PHOTOS_SMALL) | $(BIN)/python docs/photos.py docs/photos.png
	cat $(CAPTION_RECORDS) $(STATEMENT_RECORDS) > $(MEASURED)/records.jsonl
	$(BIN)/mue-hf publish $(PHOTOS_SMALL) $(PHOTOS_SMALL) --about model_cards/mue-photos-small.toml \
		--evaluation $(MEASURED)/records.jsonl --card model_cards/mue-photos-small.md

# ONNX Runtime beside torch and stock transformers: OFA-base's shapes with random weights, and the captioner of photos.
# Timings need an idle machine, one after the other; an export, a cell or a table that exists is kept. Threads of torch that
# spin between its operations would take the second core from the runtime's, hence the policy.
ENGINES ?= runs/engine
EXPORT = $(BIN)/mue-hf export
TIME = $(BIN)/mue-hf bench --images $(PHOTOS) --output $(ENGINES)/$(basename $(@F)).json --table $@
TIME_BASE = $(TIME) --model $(ENGINES)/base --exports $(ENGINES)/base-float32 $(ENGINES)/base-int8 --max-seconds 90
SMALL_EXPORTS = $(foreach kind,float32 int8 int8-trunk,$(ENGINES)/small-$(kind))
TIME_SMALL = $(TIME) --model $(PHOTOS_SMALL) --exports $(SMALL_EXPORTS) --preset balanced --variants stock lossless \
	--batch-sizes 1 8 16 --beams 1 5 --repeats 9 --max-seconds 40
BESIDE_TORCH = $(BIN)/python benchmarks/$(1).py --output $(ENGINES)/$(basename $(@F)).json --table $@

$(ENGINES)/base: | $(VENV)/dev.installed
	$(BIN)/python benchmarks/random_checkpoint.py $@ --size base --image-size 480 --processor $(PHOTOS_SMALL)
$(ENGINES)/base-float32: $(ENGINES)/base
	$(EXPORT) $< $@
$(ENGINES)/base-int8: $(ENGINES)/base
	$(EXPORT) $< $@ --int8 --int8-trunk --bfloat16-attention --calibrate-on examples/photos
$(ENGINES)/small-float32: | $(VENV)/dev.installed
	$(EXPORT) $(PHOTOS_SMALL) $@
$(ENGINES)/small-int8: | $(VENV)/dev.installed
	$(EXPORT) $(PHOTOS_SMALL) $@ --int8
$(ENGINES)/small-int8-trunk: | $(VENV)/dev.installed
	$(EXPORT) $(PHOTOS_SMALL) $@ --int8 --int8-trunk --calibrate-on $(COCO)/captions.jsonl --calibration-images 48
$(ENGINES)/photos.txt:
	@mkdir -p $(@D)
	ls $(abspath $(COCO))/images/*.jpg | head -64 > $@

docs/measurements/engine-base.md: | $(ENGINES)/base-float32 $(ENGINES)/base-int8
	OMP_WAIT_POLICY=PASSIVE $(TIME_BASE) --threads 2 --variants stock lossless half --batch-sizes 1 --beams 1 5 --repeats 5
	OMP_WAIT_POLICY=PASSIVE $(TIME_BASE) --threads 2 --variants stock lossless half --batch-sizes 8 16 --beams 1 5 --repeats 2
docs/measurements/engine-base-one-thread.md: | $(ENGINES)/base-float32 $(ENGINES)/base-int8
	$(TIME_BASE) --threads 1 --variants lossless half --batch-sizes 1 --beams 1 5 --repeats 5
	$(TIME_BASE) --threads 1 --variants lossless half --batch-sizes 8 --beams 5 --repeats 3
docs/measurements/engine-small.md: | $(SMALL_EXPORTS)
	$(TIME_SMALL) --threads 2
docs/measurements/engine-small-one-thread.md: | $(SMALL_EXPORTS)
	$(TIME_SMALL) --threads 1
docs/measurements/engine-cold-small.md: | $(SMALL_EXPORTS)
	$(call BESIDE_TORCH,cold_start) --model $(PHOTOS_SMALL) --exports $(SMALL_EXPORTS) --repeats 3
docs/measurements/engine-cold-base.md: | $(ENGINES)/base-float32 $(ENGINES)/base-int8
	$(call BESIDE_TORCH,cold_start) --model $(ENGINES)/base --exports $| --beams 5 --repeats 1
docs/measurements/engine-bulk.md: | $(ENGINES)/photos.txt $(SMALL_EXPORTS)
	$(call BESIDE_TORCH,bulk) $(ENGINES)/photos.txt --model $(PHOTOS_SMALL) --exports $(SMALL_EXPORTS) \
		--preset balanced --repeats 1
docs/measurements/engine-quality.md: $(SETS)/dev.jsonl | $(SMALL_EXPORTS)
	$(call BESIDE_TORCH,engine_quality) --model $(PHOTOS_SMALL) --exports $(SMALL_EXPORTS) --preset balanced \
		--data $(SETS)/flickr8k-test.jsonl $(SETS)/coco-test.jsonl

ENGINE_TABLES = base base-one-thread small small-one-thread cold-small cold-base bulk quality
engines: $(ENGINE_TABLES:%=docs/measurements/engine-%.md) ## Time ONNX Runtime beside torch (an hour; needs FLICKR8K= and COCO=)

test: $(VENV)/dev.installed ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# Each makes its environment anew, since that is what it tests.
lowest: ## Run the tests on the lowest versions that pyproject.toml allows, in .venv-lowest
	@mkdir -p build && $(PYTHON) .ci/floors.py > build/lowest.txt
	rm -rf .venv-lowest
	PIP_CONSTRAINT=build/lowest.txt $(MAKE) test VENV=.venv-lowest

newest: ## Run the tests on the newest versions, transformers 5 among them, in .venv-newest
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest

soak: $(VENV)/dev.installed ## Caption 2,000 images, damaged ones among them, under kills at random moments
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py $(SOAK_ARGS)

style: $(VENV)/dev.installed ## Format the code, fix what can be fixed
	$(BIN)/ruff check --fix $(check_dirs)
	$(BIN)/ruff format $(check_dirs)

cards: $(VENV)/dev.installed ## Render the model cards from what lies beside them
	@for about in model_cards/*.toml; do \
		card=$${about%.toml}; checkpoint=checkpoints/$${card##*/}; records=$$card.evaluation.jsonl; \
		if test -f $$records; then records="--evaluation $$records"; else records=; fi; \
		$(BIN)/mue-hf publish $$checkpoint $$checkpoint --about $$about $$records --card $$card.md || exit; \
	done

quality: docs ## Check format, lint, types and docs without a change
	$(BIN)/ruff check $(check_dirs)
	$(BIN)/ruff format --check $(check_dirs)
	$(BIN)/mypy

docs: $(VENV)/dev.installed ## Build the pages and the API reference into build/docs; warnings are errors
	$(BIN)/mkdocs build --quiet

dist: $(VENV)/dev.installed ## Build wheel and sdist, and check the wheel in a clean environment
	rm -rf build dist
	$(BIN)/python -m build
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip install --quiet --upgrade pip
	build/venv/bin/python -m pip install --quiet dist/*.whl
	cd build && venv/bin/python -I ../.ci/check_wheel.py ../src/mue_hf

clean: ## Remove what the other targets made, the environment too
	rm -rf $(VENV) .venv-lowest .venv-newest build dist mue-captions .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
