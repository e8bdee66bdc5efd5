"""The parts of ``gpu.py``, the most worthwhile first."""

from __future__ import annotations

from gpu_parts.harness import Part

PARTS = (
    Part(
        "calls", "loss, gradients and buffers by each strategy, 2 to 4 workers on one card", "strategies_on_card:calls",
        75, (
            "api.py: find_cluster, _torch_device, _executor",
            "cost/devices/clusters.py: _from_names, _from_count, _share",
            "cost/devices/wiring.py: _node (workers of one card)",
            "ir/cluster.py: Device.place, Cluster.__post_init__",
            "runtime/executors/threads.py: _start_workers, _current_streams, _on_streams, _enter_worker",
            "runtime/executors/post.py: LocalMailbox.send (by reference on one card)",
            "module/autograd_bridge.py: _Program (never blocks the card's autograd thread)",
        ),
    ),
    Part(
        "fused-attention", "attention with dropout is torch's kernel under the key's seed, from any thread",
        "training_on_card:fused_attention", 20, (
            "runtime/kernels/random_kernels.py: FUSED_ATTENTION, attention",
            "runtime/kernels/random.py: default_generator, Draw.on_default",
        ),
    ),
    Part(
        "dropout", "one seed, one set of masks: on other workers, in reruns, again", "training_on_card:dropout", 30,
        ("runtime/kernels/random.py: Draw.generator (on a card)",),
    ),
    Part(
        "streams", "calls queued on the caller's own stream; two models in two threads", "training_on_card:streams", 30,
        ("runtime/executors/threads.py: _current_streams, _on_streams (a stream of the caller's)",),
    ),
    Part(
        "mixes", "a card beside workers of the CPU: uneven shares, parameters in parts on both",
        "strategies_on_card:mixes", 45, (
            "runtime/executors/post.py: LocalMailbox.send (copies between card and host)",
            "runtime/executors/threads.py: _on_streams (on a worker of the CPU)",
            "runtime/parameters/model_state.py: ModelState._move, shapes_only (tiles on several devices)",
            "runtime/executors/host_memory.py: keep_host_memory (a CPU among the devices)",
            "cost/memory/fused_attention.py: with_fused_attention (a CPU among the devices)",
            "cost/devices/wiring.py: _host_links (card to host)",
        ),
    ),
    Part(
        "one-rank", "a process group of one on NCCL: every collective of a step and of a checkpoint",
        "processes_on_card:one_rank", 45, (
            "runtime/executors/process_group.py: wire_device (NCCL), group_for_messages (Gloo beside NCCL)",
            "runtime/executors/processes.py: DistributedExecutor.__init__ (set_device)",
            "runtime/parameters/tiled_tensor.py: TiledTensor (on the group's device)",
        ),
    ),
    Part(
        "two-ranks", "two processes on one card, messages by Gloo: schedules, cut parameters, AdamW fused and foreach",
        "processes_on_card:two_ranks", 95, (
            "runtime/executors/processes.py: ProcessMailbox.send, receive (by host memory)",
            "runtime/executors/rank_compare.py: _content, sizes_of (values on a GPU are left out)",
            "runtime/executors/processes.py: add_over_devices, _share (from the CPU)",
            "runtime/executors/process_group.py: wire_device (Gloo)",
            "runtime/parameters/layout.py: gather_scalars, maximum_over_ranks, _broadcast",
        ),
    ),
    Part(
        "autocast", "bfloat16 and float16 under autocast, against the plain model under the same",
        "training_on_card:autocast", 30, ("trace/export.py: _autocast",
        "runtime/executors/threads.py: LocalExecutor._on_all (autocast off)"),
    ),
    Part(
        "scaler", "a GradScaler in fused steps and in the user's loop; a step that is skipped",
        "training_on_card:scaler", 30, ("module/fused_update.py: Update.seed, finish (scaler)",
        "module/optimizer_watch.py: _value (a tensor is read where it is)"),
    ),
    Part("batch-norm", "statistics over all microbatches, and by microbatch", "training_on_card:batch_norm", 30,
         ("runtime/kernels/batch_norm.py: batch_norm (cuDNN's kernel)",)),
    Part("optimizers", "AdamW plain, foreach and fused, over whole and cut parameters; clipping",
         "training_on_card:optimizers", 45,
         ("runtime/parameters/tiled_dispatch.py: _pieces, _run_by_device (tiles on card and host)",)),
    Part("recompute", "blocks that run again, with dropout, by schedule", "memory_on_card:recompute", 30),
    Part(
        "offload", "what they read waits in pinned memory: bits, memory, part of the way that is hidden",
        "memory_on_card:offload", 45, (
            "api.py: check_offload",
            "runtime/device/device_code.py: DeviceCode.shelf",
            "runtime/device/offload.py: PinnedShelf.__init__, PinnedShelf.put, PinnedTensor.back",
            "runtime/device/rerun.py: Rerun.put_away",
        ),
    ),
    Part(
        "errors", "memory that runs out is told with operator, device and forecast", "training_on_card:errors", 30,
        ("runtime/device/located.py: _is_out_of_memory, _memory",),
    ),
    Part("async", "updates while microbatches are under way", "strategies_on_card:asynchronous", 20),
    Part(
        "gpt2", "GPT-2 small on one worker: time and memory beside eager's and beside the forecast", "figures:gpt2", 60,
        ("runtime/device/worker.py: DeviceRun._now_s (synchronize)", "module/calibrate.py: calibrate (recorded steps)",
         "cost/memory/fused_attention.py: with_fused_attention"),
    ),
    Part("attention", "attention with dropout: time and memory of ours, torch's and written out",
         "figures:attention_with_dropout_on_card", 20),
    Part("copies", "what cutting costs on one card; copies between workers, to and from the host",
         "figures:workers_of_one_card", 30),
    Part(
        "schedules", "two fused steps by each strategy and schedule, against eager steps",
        "strategies_on_card:schedules", 90, (
            "runtime/kernels/operand_gradients.py: _embedding.add_of_weight (is_cuda)",
            "runtime/kernels/cross_entropy.py: pick_class (labels out of range, in its gather)",
            "module/fused_update.py: Update.update (on workers' threads)",
            "module/partitioned.py: train_step (records only where there is no GPU)",
        ),
    ),
    Part("pipelines-8", "1F1B on 8 one-thread workers, threads and processes, beside torch.distributed.pipelining",
         "rivals:pipelines_8", 60),
    Part("splits-8", "feature and batch splits on 8 one-thread workers, beside DTensor and DDP", "rivals:splits_8", 60),
    Part("bert", "BERT base, as GPT-2", "figures:bert", 60),
    Part("resnet", "ResNet-50, as GPT-2", "figures:resnet", 60),
    Part("uneven", "samples and columns in uneven shares, by hand", "strategies_on_card:uneven", 20),
    Part("pipelines-4", "the same on 4", "rivals:pipelines_4", 45),
    Part("splits-4", "the same on 4", "rivals:splits_4", 45),
    Part("pipelines-2", "the same on 2", "rivals:pipelines_2", 45),
    Part("splits-2", "the same on 2", "rivals:splits_2", 45),
)  # fmt: skip
"""Everything that ``gpu.py`` runs."""
