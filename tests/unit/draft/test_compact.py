"""Training from a compact dump: its teacher is the full one restricted to the kept ids, and its fc folds into an ordinary one."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save

from eagle3_offline.config import ExportConfig
from eagle3_offline.draft.batch import collate
from eagle3_offline.draft.export import export, read_export
from eagle3_offline.draft.held_out import measure
from eagle3_offline.draft.loss import Objective, RowTerms, denominators
from eagle3_offline.draft.model import new_head
from eagle3_offline.draft.teacher import CompactTeacher, FullTeacher
from eagle3_offline.draft.trained import TrainedDraft, load_trained, save_trained
from eagle3_offline.draft.unroll import unroll
from eagle3_offline.draft.vocabulary import DraftVocabulary
from eagle3_offline.records import TopLogits, UserError

from .conftest import HIDDEN, LAYERS, VOCAB, make_sample

K, RANK = 3, 10


def compacted(sample, lm_head, k: int):
    """The sample as a compact dump gives it, its teachers' k largest logits (in float32, so that nothing is rounded)."""
    z = torch.from_numpy(sample.last) @ lm_head.T
    total = z.logsumexp(-1)
    values, ids = z.topk(k)
    top = TopLogits(ids.int().numpy(), (values - total[:, None]).float().numpy(), total.float().numpy())
    return dataclasses.replace(sample, last=None, top=top)


def loss_of(head, batch, embed, teacher, name):
    objective = Objective(name, "token", 0.8, denominators([batch], "token"), torch.full((K,), 0.3))
    return head(batch, embed, RowTerms(batch, teacher(batch, whole=True), objective))[0]


def test_the_teacher_is_the_full_one_restricted_to_the_kept_ids(sample, lm_head, target_ids):
    k = 6
    batch, full = collate([compacted(sample, lm_head, k)], K), collate([sample], K)
    compact = CompactTeacher(VOCAB, target_ids)(batch, whole=True)
    whole = FullTeacher(lm_head, target_ids)(full, whole=True)
    assert torch.equal(compact.argmax_known, whole.argmax_known) and not compact.argmax_known.all()
    z = full.last @ lm_head.T  # [n, V]
    draft_id = {int(token): i for i, token in enumerate(target_ids)}
    for row in range(len(z)):
        kept = [int(i) for i in z[row].topk(k).indices if int(i) in draft_id]
        expected = torch.zeros(len(target_ids), dtype=torch.float64)
        for token in kept:
            expected[draft_id[token]] = z[row, token].exp() / z[row, kept].exp().sum()
        found = torch.zeros(len(target_ids)).scatter_add(0, compact.ids[row], compact.inside[row])
        assert torch.allclose(found.double(), expected, atol=1e-5)
        true = torch.zeros(len(target_ids)).scatter_add(0, compact.ids[row], compact.true[row])
        assert torch.allclose(true[found > 0], whole.true[row][found > 0].float(), rtol=1e-4)


def test_with_every_logit_kept_loss_and_measures_are_the_full_teachers(head, sample, embed, lm_head, target_ids):
    head, embed, lm_head = head.float(), embed.float(), lm_head.float()
    sample = dataclasses.replace(sample, aux=sample.aux.astype(np.float32), last=sample.last.astype(np.float32))
    compact = compacted(sample, lm_head, VOCAB)
    results = []
    for given, teacher in ((sample, FullTeacher(lm_head, target_ids)), (compact, CompactTeacher(VOCAB, target_ids))):
        batch = collate([given], K)
        loss = loss_of(head, batch, embed, teacher, "lk-lambda")
        loss.backward()
        gradient = head.fc.weight.grad.clone()
        head.zero_grad()
        found = measure(head, [given], embed=embed, target_ids=target_ids, chain=K, teacher=teacher).summary()
        results.append((loss.item(), gradient, found))
    (loss, gradient, found), (loss_too, gradient_too, found_too) = results
    assert loss_too == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(gradient_too, gradient, atol=1e-5)
    assert found_too["alpha"] == pytest.approx(found["alpha"], rel=1e-4)
    assert found_too["kl"] == pytest.approx(found["kl"], rel=1e-4)


@pytest.mark.parametrize("name", ["soft cross-entropy", "lk-alpha", "lk-lambda"])
def test_gradients_where_few_logits_are_kept(sample, lm_head, target_ids, name):
    """Of logits [n, D], against autograd over the rows one by one."""
    batch = collate([compacted(sample, lm_head, 6)], K)
    teacher = CompactTeacher(VOCAB, target_ids)(batch, whole=True)
    assert (teacher.true == 0).any()  # a kept token that is none of the draft's
    mean_alpha = torch.tensor([0.3, 0.2, 0.1])
    terms = RowTerms(batch, teacher, Objective(name, "token", 0.8, denominators([batch], "token"), mean_alpha))
    torch.manual_seed(0)
    logits = torch.randn(len(terms.row), len(target_ids), dtype=torch.float64, requires_grad=True)
    expected, row = torch.zeros((), dtype=torch.float64), 0
    for k, step in enumerate(batch.steps):
        share = torch.exp(-3 * mean_alpha[k]).double()
        for t in step.teacher:
            q = logits[row].softmax(0)[teacher.ids[t]]
            entropy = -(teacher.inside[t].double() * q.log()).sum()
            alpha = torch.minimum(teacher.true[t].double(), q).sum()
            value = {
                "soft cross-entropy": entropy,
                "lk-alpha": -alpha.clamp(min=1e-6).log(),
                "lk-lambda": share * entropy + (1 - share) * (1 - alpha),
            }
            expected = expected + 0.8**k * value[name] * teacher.argmax_known[t] / len(step.rows)
            row += 1
    expected.backward()
    found, gradient = terms(logits.detach().clone(), 0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # weights and teachers are fp32
    assert torch.allclose(gradient, logits.grad, atol=1e-8, rtol=1e-6) and gradient.abs().max() > 1e-3


def test_a_teacher_with_no_kept_id_inside_gives_no_loss_and_stays_finite(head, sample, embed, lm_head, target_ids):
    compact = compacted(sample, lm_head, 2)
    outside = [token for token in range(VOCAB) if token not in set(target_ids.tolist())]
    compact = dataclasses.replace(compact, top=dataclasses.replace(compact.top, ids=np.full_like(compact.top.ids, outside[0])))
    batch = collate([compact], K)
    teacher = CompactTeacher(VOCAB, target_ids)
    loss = loss_of(head, batch, embed, teacher, "soft cross-entropy")
    loss.backward()
    assert loss.item() == 0.0 and all(torch.isfinite(p.grad).all() for p in head.parameters())
    found = measure(head, [compact], embed=embed, target_ids=target_ids, chain=K, teacher=teacher).summary()
    assert found["alpha"] == [0.0] * K and found["kl"] == [0.0] * K


@pytest.fixture
def projected(settings, tmp_path):
    """A draft trained in a projection of rank 10, on disk, and the vocabulary's ids."""
    rng = np.random.default_rng(0)
    components, _ = np.linalg.qr(rng.normal(size=(len(LAYERS) * HIDDEN, RANK)))
    scale = rng.uniform(0.5, 20, len(LAYERS) * HIDDEN)
    basis = save({"components": torch.from_numpy(components).float(), "scale": torch.from_numpy(scale).float()})
    head = new_head(dataclasses.replace(settings, rank=RANK), seed=3)
    vocabulary = DraftVocabulary(np.arange(settings.draft_vocab_size), 1.0)
    draft = TrainedDraft(head, vocabulary, None, {"dump": "d", "summary": {}}, basis)
    save_trained(tmp_path, head.state_dict(), draft, {"config.json": b"{}"})
    return tmp_path


def test_the_folded_draft_gives_the_trained_ones_logits(projected, embed):
    """On unquantised projections, fp32: equal to rounding. The export reads nothing but the draft's folder."""
    trained = load_trained(projected)
    export(projected, ExportConfig(dtype="float32"))
    head, _ = read_export(projected / "export")
    assert head.fc.weight.shape == (HIDDEN, len(LAYERS) * HIDDEN) and head.settings.rank is None
    sample = make_sample("row", 12, ((3, 7), (9, 12)), seed=5)
    raw = dataclasses.replace(sample, aux=sample.aux.astype(np.float32) * 10)
    small = dataclasses.replace(raw, aux=trained.project(raw.aux))
    assert small.aux.shape == (12, RANK)
    for ours, served in zip(
        unroll(trained.head, collate([small], K), embed.float(), K), unroll(head, collate([raw], K), embed.float(), K), strict=True
    ):
        assert torch.allclose(ours, served, atol=1e-5)


def test_another_basis_than_the_trainings_is_refused(projected):
    (projected / "basis.safetensors").write_bytes((projected / "basis.safetensors").read_bytes() + b" ")
    with pytest.raises(UserError, match="with which the draft was trained"):
        load_trained(projected)
