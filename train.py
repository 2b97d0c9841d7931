"""Train a face-recognition network: ArcFace and its relatives with Partial FC, in one process or many.

    python train.py configs/ms1mv2_r50.yaml run.batch_size=64
    python -m paddle.distributed.launch --nproc_per_node 8 train.py configs/ms1mv2_r50.yaml
    python train.py configs/ms1mv2_r50.yaml --resume            # go on from the newest undamaged checkpoint

One update is ``update``; the loop around it is ``train``; what they work on is made in ``build``.
"""

import contextlib
import math
import zlib  # noqa: F401 - before paddle: 2.6 exports a zlib of its own, on which later imports crash
from pathlib import Path

import paddle

from backbones import build_backbone
from config import Config, dump_config, fresh, parse_arguments
from dataset import build_source, build_train_loader, open_source, save_identities
from eval.during_training import Verification
from losses import build_margin
from partial_fc import PartialFC
from utils import distributed
from utils.errors import UserError, one_line_errors
from utils.files import write_text
from utils.head.angles import log_angles
from utils.model.ema import Ema
from utils.model.optimizer import BackboneOptimizer, clip_coefficient, squared_gradient, trainable, unscaled_norm
from utils.model.precision import LossScaler, autocast, check_precision
from utils.model.replica import Replica
from utils.model.schedule import LrSchedule, scaled_lr
from utils.run.checkpoint import CheckpointWriter
from utils.run.folder import open_run_folder, owned_run_folder
from utils.run.log import RunLog
from utils.run.meters import Meter, SpikeDetector, due
from utils.run.pictures import open_pictures
from utils.run.state import Run, find_resume, fit_batch, restore, seed_update
from utils.run.steps import Feed, StopSignal, Update, finish, log_update, report_odd, save
from utils.run.summary import summarize
from utils.run.watchdog import Watchdog
from utils.system import choose_convolutions, gpu_capability, keep_freed_memory
from utils.weights.initial import load_initial
from utils.weights.states import save_pdparams

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "ms1mv2_r50.yaml"


def build(config: Config) -> Run:
    """Everything a run needs. All ranks call it; bad input on one of them ends all, each with one line."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    run, data, model, optim = config.run, config.data, config.model, config.optim
    common = {"rank": rank, "world_size": world_size, "seed": run.seed}
    with distributed.together():
        source, num_classes = open_source(data, config.source_options())
        check_precision(run.precision, paddle.get_device(), gpu_capability())
        margin = build_margin(config.head.margin.name, **config.head.margin.kwargs())
        paddle.seed(run.seed)
        backbone = build_backbone(model.network, **model.kwargs())
        verification = None
        if (wanted := config.verify).sets:
            verification = Verification(wanted.root or data.folder, wanted.sets, wanted.batch_size, model.input_size)
    expected = {"network": model.network, "num_classes": num_classes, "embedding_size": model.embedding_size}
    resume = find_resume(config, expected, len(source))
    batch_size, accumulation, batch_note = fit_batch(resume, run.batch_size, run.accumulation, world_size)
    with distributed.together():
        loader = build_train_loader(source, batch_size, **common, **config.loader_options())
        steps_per_epoch = len(loader) // accumulation
        if steps_per_epoch == 0:
            raise UserError(f"run.accumulation: {accumulation} micro-batches, but an epoch has only {len(loader)}")
        head = PartialFC(num_classes, model.embedding_size, margin, **common, **config.head_options())
        init = config.init
        init_note = load_initial(backbone, head, init.backbone, init.head, init.freeze, init.optional)
    replica = Replica(backbone, run.sync_bn, recompute=bool(model.recompute), compile=run.compile)
    optimizer = BackboneOptimizer(trainable(backbone), **config.optimizer_options())
    images_per_update = batch_size * accumulation * world_size
    base_lr = scaled_lr(optim.lr, optim.lr_batch, images_per_update)
    schedule = LrSchedule(base_lr=base_lr, **config.schedule_options(steps_per_epoch))
    moved = open_run_folder(run.output, fresh=resume is None)
    dashboards = {"tensorboard": config.log.tensorboard, "visualdl": config.log.visualdl}
    step = resume["step"] if resume else None
    log = RunLog(run.output, rank, resume_step=step, total_steps=schedule.total_steps, **dashboards)
    parts = Run(
        config=config,
        loader=loader,
        replica=replica,
        head=head,
        optimizer=optimizer,
        schedule=schedule,
        scaler=LossScaler(run.precision, run.loss_scale, run.max_skips),
        ema=Ema(backbone, run.ema) if run.ema else None,
        verification=verification,
        log=log,
        writer=CheckpointWriter(run.output, config.checkpoint.keep, config.checkpoint.asynchronous),
        watchdog=Watchdog(run.output, run.hang_timeout, on_end=log.warning),
        spikes=SpikeDetector(config.log.spike),
        accumulation=accumulation,
        images_per_update=images_per_update,
    )
    with distributed.together():
        parts.pictures = open_pictures(config, log, build_source)
        if resume:
            restore(parts, resume)
        if rank == 0:
            write_text(Path(run.output) / "config.yaml", dump_config(fresh(config)))
            save_identities(run.output, source)
    doubts = (*source.notes, *(verification.warnings if verification else ()))
    for note in filter(None, (moved, batch_note, init_note, *doubts, summarize(parts, len(source), resume))):
        log.info(note)
    return parts


def update(run: Run, batches: list, lr: float, with_angles: bool = False, meanwhile=None) -> Update:
    """Forward, backward and step over the micro-batches of one update. All ranks call it.

    On an accelerator the host waits once: for the three numbers that decide whether and how far to step. All work up to
    them is launched by then, and ``meanwhile`` (what the next update needs of the host) is done.
    """
    config, head, scale = run.config, run.head, run.scaler.scale
    seed_update(config.run.seed, run.progress.step, distributed.get_rank())
    head.prepare(run.use(batches))
    loss = 0.0
    for index, (image_BCHW, label_B) in enumerate(batches):
        run.watchdog.enter("forward")
        with run.replica.micro_batch(last=index == len(batches) - 1):
            with autocast(config.run.precision):
                embedding_BD = run.replica(image_BCHW)
            part = head(embedding_BD, label_B)
            run.watchdog.enter("backward")
            (part * (scale / len(batches))).backward()
        loss = part.detach() + loss
    run.replica.finish_backward()
    run.watchdog.enter("update")
    square = squared_gradient(run.optimizer.gradients())
    figures = run.replica.sum_figures([loss, square, head.found_nonfinite()])
    angles = log_angles(head) if with_angles else None
    if meanwhile is not None:
        meanwhile()
    # One decision for all ranks, from the same bits: a rank that stepped alone would part from the others for good.
    loss, square, broken = (figures.numpy() / run.replica.world_size).tolist()
    loss, grad_norm = loss / len(batches), unscaled_norm(square, scale)
    skipped = not math.isfinite(loss) or not math.isfinite(grad_norm) or broken > 0
    if skipped:
        head.skip_step()
    else:
        clip = clip_coefficient(grad_norm, config.optim.clip_norm)
        run.optimizer.step(lr * config.optim.backbone_lr_scale, clip / scale)
        head.step(lr * config.head.lr_scale, 1.0 / scale)
    run.replica.finish_update(skipped)
    if run.ema is not None and not skipped:
        run.ema.update(run.replica.backbone)
    run.optimizer.clear_grad()
    run.scaler.update(skipped)
    return Update(loss, grad_norm, skipped, angles)


def train(run: Run) -> None:
    """The loop: data, update, and on their cadence log, verify, save; until the schedule ends or someone stops it."""
    config, progress, meter = run.config, run.progress, Meter()
    run.watchdog.start()
    with StopSignal() as stop:
        feed = Feed(run, stop)
        while run.schedule_step < run.schedule.total_steps and not (progress.stopped_early or stop.agreed):
            batches = feed.next()
            lr = run.schedule(run.updates_at(batches.start))
            log_due = progress.step == 0 or due(progress.step + 1, config.log.every_steps)
            done = update(run, batches, lr, log_due and config.log.angles, feed.ahead)
            progress.step += 1
            meter.add(run.images_per_update, batches.waited, done.loss)
            run.watchdog.done(progress.step)
            report_odd(run, done)
            if log_due:
                log_update(run, done, lr, meter)
            with meter.paused():
                if run.pictures is not None:
                    run.pictures.draw(run.replica.backbone, run.head, progress.step, batches[0][0])
                improved = due(progress.step, config.verify.every_steps) and verify(run)
                if improved or due(progress.step, config.checkpoint.every_steps):
                    save(run, best=improved)
        improved = config.verify.at_end and not stop.agreed and progress.verified_step != progress.step and verify(run)
        if run.pictures is not None:
            run.pictures.draw(run.replica.backbone, run.head, progress.step)
        finish(run, best=improved, stopped=stop.agreed)


def verify(run: Run) -> bool:
    """Judge the backbone (its average, with ``run.ema``) on the pair sets; whether it is the best so far."""
    if run.verification is None:
        return False
    run.watchdog.enter("verify")
    progress, backbone = run.progress, run.replica.backbone
    with run.ema.applied_to(backbone) if run.ema is not None else contextlib.nullcontext():
        figures = run.verification(backbone)
        mean = sum(each["accuracy"] for each in figures.values()) / len(figures)
        improved = progress.verified(mean, run.config.verify.patience)
        if improved and distributed.get_rank() == 0:
            weights = {name: tensor.numpy() for name, tensor in backbone.state_dict().items()}
            save_pdparams(Path(run.config.run.output) / "backbone_best.pdparams", weights)
    for name, values in figures.items():
        run.log.verify(progress.step, name, values)
    if progress.stopped_early:
        run.log.info(f"no better verification in {progress.verifications_since_best} (verify.patience): stopping")
    run.watchdog.done(progress.step)
    return improved


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    config = parse_arguments(argv, DEFAULT_CONFIG, __doc__)
    if distributed.init(config.run.device) == "cpu":
        keep_freed_memory()
    choose_convolutions(config.run.deterministic)
    with owned_run_folder(config.run.output):
        run = build(config)
        try:
            train(run)
            run.watchdog.stop()
        except UserError:  # all ranks have it; anything else the other ranks learn from the missing heartbeat
            run.watchdog.stop()
            raise
        finally:
            run.log.close()
            run.loader.close()


if __name__ == "__main__":
    main()
