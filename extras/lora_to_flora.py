"""A LoRA made into a FLoRA, which the paper leaves for future work (§6).

  python train.py --adapter flora --rank 4 --from-lora out/lora-r4/adapter.safetensors
  python train.py --adapter flora --rank 4 --from-lora out/lora-r4/adapter.safetensors --steps 0

First the FLoRA whose weights are nearest to the LoRA's (fit_flora), without data; then, unless
--steps is 0, training towards the LoRA's predictions on --data (distillation_loss), without labels.
"""
import time

import torch
import torch.nn.functional as F

import flora
import train
from flora import BASE
from plumbing.files import BadInput
from plumbing.processes import RANK, interrupts, say
from plumbing.report import make_report, say_sizes
from plumbing.runs import begin

# --------------------------------------------------------------------------------------- the fit


def fit_flora(W0, W, rank, rounds=10):
    """The best W0 ∘ BA for a given W, both [d, k], in the Frobenius norm: argmin ‖W0 ∘ BA - W‖.

    A low-rank approximation of W / W0 weighted by W0²: alternating least squares in float64, from
    the identity and the steepest directions away from it. With B fixed each column of A is a system
    of r equations, and the other way round. The error never grows.
    -> (A [r, k], B [d, r], [the identity's error, the error after each round]).
    """
    W0, W = W0.double(), W.double()
    B, A = W0.new_ones(W0.shape[0], rank), W0.new_zeros(rank, W0.shape[1])
    A[0] = 1
    gradient = W0 * (W - W0)                                                  # [d, k]
    steepest = torch.svd_lowrank(gradient, q=min(rank + 3, *W.shape), niter=4)[0][:, :rank - 1]
    B[:, 1:1 + steepest.shape[1]] = steepest * len(B)**0.5                    # [d, r - 1]
    squares, products = W0 * W0, W0 * W
    errors = [(W0 * (B @ A) - W).norm().item()]
    for _ in range(rounds):
        A = least_squares(squares.T, products.T, B, A.T).T
        B = least_squares(squares, products, A.T, B)
        errors.append((W0 * (B @ A) - W).norm().item())
    return A, B, errors


def least_squares(weights, targets, fixed, last):
    """argmin over x [n, r] of sum_m weights (x · fixed)² - 2 targets (x · fixed).

    weights and targets [n, m], fixed [m, r], one row of it for each m. A slight pull to `last`
    [n, r], the previous x, decides where the sum alone does not.
    """
    rank = fixed.shape[1]
    outer = (fixed[:, :, None] * fixed[:, None]).flatten(1)                   # [m, r r]
    G = (weights @ outer).unflatten(1, (rank, rank))                          # [n, r, r]
    pull = 1e-9 * G.diagonal(dim1=1, dim2=2).mean() + 1e-30
    G = G + pull * torch.eye(rank, dtype=G.dtype, device=G.device)
    return torch.linalg.solve(G, targets @ fixed + pull * last)


@torch.no_grad()
def flora_from_lora(model, lora_id, rank):
    """Add the FLoRA of `rank`, on the same targets, whose weights are nearest to a LoRA's.

    Returns (its id, its error): ‖W0 ∘ BA / r - W‖ over all layers, relative to the ‖W0 - W‖ of the
    base model, so that 0 is the LoRA itself and 1 no adapter at all. BadInput unless it is a LoRA.
    """
    loras = flora.adapters_of(model, lora_id)
    first = next(iter(loras.values()))
    if first.kind != "lora":
        raise BadInput(f"adapter {lora_id} is of kind {first.kind}; a FLoRA is fitted to a LoRA")
    fitted = flora.make_adapters(model, "flora", rank, targets_of(loras), first.alpha)
    before = after = 0.0
    for name, lora in loras.items():
        lo, hi = lora.columns
        W0 = model.get_submodule(name).W0()[:, lo:hi].double()
        change = lora.alpha / lora.rank * (lora.B.double() @ lora.A.double())
        A, B, errors = fit_flora(W0, W0 + change, rank)
        fitted[name].A.copy_(A * rank)
        fitted[name].B.copy_(B)
        before, after = before + errors[0]**2, after + errors[-1]**2
    return flora.attach(model, fitted), (after / before)**0.5 if before else 0.0


def targets_of(adapters):
    """{layer name: Adapter} -> the targets that they were made for, each once."""
    return list(dict.fromkeys(adapter.target for adapter in adapters.values()))


# ---------------------------------------------------------------------------------- distillation


def distillation_loss(model, base_model, x, adapter_ids, teacher_ids):
    """Mean over all positions of x [B, T] of KL(teacher ‖ student) in nats; there are no labels.

    Both are adapters of one model; base_model is that model outside of DDP and compilation."""
    with torch.no_grad():
        teacher = base_model(x, teacher_ids).flatten(0, 1).float().log_softmax(-1)   # [B T, vocab]
    student = model(x, adapter_ids).flatten(0, 1).float().log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def copy_lora(args):
    """train.py's run for --from-lora."""
    with begin(args) as run:
        return fit_and_distil(args, run)


def fit_and_distil(args, run):
    """The fit, then --steps of distillation -> the report."""
    model, tokenizer = train.load_base(args, run.device, getattr(torch, args.dtype))
    teacher_id = flora.load_adapter(model, args.from_lora)
    model.requires_grad_(False)
    tick = time.time()
    adapter_id, fit_error = flora_from_lora(model, teacher_id, args.rank)
    fit = dict(fit_error=fit_error, fit_seconds=time.time() - tick)
    say(f"fitted to {args.from_lora} in {fit['fit_seconds']:.1f} s: "
              f"relative error of the weights {fit_error:.4f}")
    parameters = flora.adapter_parameters(model, adapter_id)
    say_sizes(args, model, parameters)
    data = train.encode_data(args, run.texts, tokenizer)

    def loss(student, x, y, adapter_ids):
        teacher_ids = torch.full_like(adapter_ids, teacher_id)
        return distillation_loss(student, model, x, adapter_ids, teacher_ids)

    task = train.text_task(args, model, data, adapter_id, loss)
    with interrupts() as stop:
        log, rate = train.fit(model, parameters, *task, train.loop_of(args), stop, run.checkpoint)
    report = make_report(args, model, parameters, data, log, rate)
    if RANK > 0:
        return report
    targets = targets_of(flora.adapters_of(model, adapter_id))
    report |= dict(from_lora=args.from_lora, targets=targets) | fit
    report |= compare(args, model, data, teacher_id, report["heldout_loss_after"])
    return train.finish_adapter(args, model, adapter_id, report)


def compare(args, model, data, teacher_id, after):
    """The held-out losses of the base and the LoRA, and the share of the LoRA's gain that a FLoRA
    of held-out loss `after` keeps (None if there is no gain)."""
    base = train.heldout_loss(model, data, BASE, args.dtype)
    teacher = train.heldout_loss(model, data, teacher_id, args.dtype)
    share, said = None, "the LoRA gains nothing"
    if teacher < base:
        share = (base - after) / (base - teacher)
        said = f"{100 * share:.1f} % of its gain survives"
    say(f"held-out loss of the base {base:.4f}, of the LoRA {teacher:.4f}; {said}")
    return dict(heldout_loss_base=base, heldout_loss_teacher=teacher, share_of_gain=share)
