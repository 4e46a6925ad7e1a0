"""The unroll and its loss against an independent plain loop: per root row, the chain is rebuilt from nothing. float64."""

import dataclasses
import math

import pytest
import torch

from eagle3_offline.draft import loss as draft_loss
from eagle3_offline.draft.batch import collate
from eagle3_offline.draft.loss import Objective, RowTerms, denominators
from eagle3_offline.draft.model import new_head
from eagle3_offline.draft.teacher import FullTeacher, TeacherRows, argmax
from eagle3_offline.draft.unroll import unroll
from eagle3_offline.records import turn_of_token

from .conftest import TURNS, make_sample

K, DECAY = 4, 0.8
MEAN_ALPHA = [0.4, 0.3, 0.2, 0.1]  # of the optimiser step before, per step


# -- the plain loop: no code of the project below this line but the weights' names


def plain_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def plain_rotate(x, position, theta):
    half = len(x) // 2
    out = []
    for i in range(len(x)):
        angle = position * theta ** (-2 * (i % half) / len(x))
        other = -x[i + half] if i < half else x[i - half]
        out.append(x[i] * math.cos(angle) + other * math.sin(angle))
    return torch.stack(out)


class PlainDraft:
    def __init__(self, weights, heads, kv_heads, head_dim, eps=1e-5, theta=10000.0, fc_norm=False, norm_output=False):
        self.fc_norm, self.norm_output = fc_norm, norm_output
        self.w, self.heads, self.kv_heads, self.head_dim, self.eps, self.theta = weights, heads, kv_heads, head_dim, eps, theta

    def mixed(self, embedding, g):
        w = self.w
        first = plain_norm(embedding, w["midlayer.input_layernorm.weight"], self.eps)
        return torch.cat((first, plain_norm(g, w["midlayer.hidden_norm.weight"], self.eps)))

    def key_value(self, u, position):
        k = (self.w["midlayer.self_attn.k_proj.weight"] @ u).reshape(self.kv_heads, self.head_dim)
        v = (self.w["midlayer.self_attn.v_proj.weight"] @ u).reshape(self.kv_heads, self.head_dim)
        return [plain_rotate(head, position, self.theta) for head in k], list(v)

    def layer(self, u, g, position, pairs):
        w = self.w
        q = (w["midlayer.self_attn.q_proj.weight"] @ u).reshape(self.heads, self.head_dim)
        out = []
        for h in range(self.heads):
            kv = h // (self.heads // self.kv_heads)
            query = plain_rotate(q[h], position, self.theta)
            scores = torch.stack([query @ keys[kv] / math.sqrt(self.head_dim) for keys, _ in pairs])
            weights = torch.softmax(scores, 0)
            out.append(sum(weight * values[kv] for weight, (_, values) in zip(weights, pairs, strict=True)))
        h = g + w["midlayer.self_attn.o_proj.weight"] @ torch.cat(out)
        x = plain_norm(h, w["midlayer.post_attention_layernorm.weight"], self.eps)
        gate, up = w["midlayer.mlp.gate_proj.weight"] @ x, w["midlayer.mlp.up_proj.weight"] @ x
        return h + w["midlayer.mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)

    def feature(self, aux):
        if self.fc_norm:
            chunks = aux.reshape(3, -1)
            aux = torch.cat([plain_norm(chunk, self.w[f"fc_norm.{i}.weight"], self.eps) for i, chunk in enumerate(chunks)])
        return self.w["fc.weight"] @ aux

    def chain(self, p, x, aux, embed, length):
        """Logits of root row p at steps 0 .. length-1, true tokens read."""
        features = [self.feature(a) for a in aux]
        pairs = [self.key_value(self.mixed(embed[x[j + 1]], features[j]), j) for j in range(p + 1)]
        g, out = features[p], []
        for k in range(length):
            u = self.mixed(embed[x[p + 1 + k]], g)
            if k:
                pairs.append(self.key_value(u, p + k))
            g = self.layer(u, g, p + k, pairs)
            normed = plain_norm(g, self.w["norm.weight"], self.eps)
            out.append(self.w["lm_head.weight"] @ normed)
            g = normed if self.norm_output else g
        return out


def plain_row_loss(z, logits, target_ids, loss, mean_alpha):
    """One row's loss as the papers write it: soft cross-entropy (EAGLE-3), -log alpha and the adaptive mixture (LK losses)."""
    teacher, q = torch.softmax(z[target_ids], 0), torch.softmax(logits, 0)
    entropy = -(teacher * torch.log(q)).sum()
    if loss == "soft cross-entropy":
        return entropy
    true = torch.softmax(z, 0)  # over the whole vocabulary
    alpha = sum(min(true[int(token)], q[i]) for i, token in enumerate(target_ids))
    if loss == "lk-alpha":
        return -torch.log(alpha)
    w = math.exp(-3 * mean_alpha)
    return w * entropy + (1 - w) * (1 - alpha)


def plain_loss(draft, samples, embed, lm_head, target_ids, normalisation, loss):
    """Sum over steps of DECAY**k times the mean loss of the rows that are alive."""
    inside = set(target_ids.tolist())
    terms = {}  # (step, conversation) -> cross-entropies
    for number, s in enumerate(samples):
        x, turn = s.input_ids, turn_by_hand(s)
        aux = [torch.from_numpy(s.aux[t]) for t in range(len(x))]
        last = {int(t): torch.from_numpy(row) for t, row in zip(s.last_positions, s.last, strict=True)}
        for p in range(len(x)):
            alive = [k for k in range(K) if p + 2 + k < len(x) and turn[p + 1] and turn[p + 1] == turn[p + 2 + k]]
            if not alive:
                continue
            for k, logits in zip(alive, draft.chain(p, x, aux, embed, len(alive)), strict=True):
                z = lm_head @ last[p + 1 + k]
                value = plain_row_loss(z, logits, target_ids, loss, MEAN_ALPHA[k])
                kept = int(z.argmax()) in inside
                terms.setdefault((k, number), []).append(value if kept else value * 0)
    total = torch.zeros((), dtype=torch.float64)
    for k in range(K):
        rows = [values for (step, _), values in terms.items() if step == k]
        if not rows:
            continue
        if normalisation == "token":
            mean = sum(sum(values) for values in rows) / sum(len(values) for values in rows)
        else:
            mean = sum(sum(values) / len(values) for values in rows) / len(rows)
        total = total + DECAY**k * mean
    return total


def turn_by_hand(sample):
    return [next((n + 1 for n, (a, b) in enumerate(sample.turns) if a <= t < b), 0) for t in range(len(sample.input_ids))]


# -- the comparison


def module_loss(head, samples, embed, lm_head, target_ids, normalisation, loss):
    batch = collate(samples, K)
    z = batch.last @ lm_head.T
    known = torch.isin(argmax(batch.last, lm_head), target_ids)
    teacher = TeacherRows(z[:, target_ids].softmax(-1), None, known, z.softmax(-1)[:, target_ids])
    objective = Objective(loss, normalisation, DECAY, denominators([batch], normalisation), torch.tensor(MEAN_ALPHA))
    return head(batch, embed, RowTerms(batch, teacher, objective))[0]


@pytest.mark.parametrize("block_rows", [3, 10**6])
@pytest.mark.parametrize("normalisation", ["sequence", "token"])
@pytest.mark.parametrize("loss", ["soft cross-entropy", "lk-alpha", "lk-lambda"])
def test_loss_and_gradients_equal_the_plain_loop(head, sample, embed, lm_head, target_ids, loss, normalisation, block_rows, monkeypatch):
    monkeypatch.setitem(draft_loss.BLOCK_ELEMENTS, "cpu", block_rows * len(target_ids))
    monkeypatch.setitem(draft_loss.PART_ELEMENTS, "cpu", 2 * len(target_ids))  # blocks of 3 rows end in a part of 1
    samples = [sample, make_sample("second", 10, ((4, 9),), seed=8), make_sample("no live row", 5, ((3, 4),), seed=9)]
    weights = {name: p.detach().clone().requires_grad_() for name, p in head.named_parameters()}
    plain = plain_loss(PlainDraft(weights, 4, 2, 8), samples, embed, lm_head, target_ids, normalisation, loss)
    ours = module_loss(head, samples, embed, lm_head, target_ids, normalisation, loss)
    assert ours.item() == pytest.approx(plain.item(), abs=1e-6)  # the rotary tables are fp32
    plain.backward()
    (3.0 * ours).backward()  # the accumulation multiplies it
    for name, parameter in head.named_parameters():
        assert torch.allclose(parameter.grad / 3.0, weights[name].grad, atol=1e-6, rtol=0), name
        assert parameter.grad.abs().max() > 0, f"{name} gets no gradient"


def test_the_vocabulary_heads_gradient_is_summed_in_fp32(monkeypatch):
    """In bfloat16, by blocks of one row: a narrow sum would stop growing at 256 parts of the size of its last place."""
    rows, size = 1024, 4
    monkeypatch.setitem(draft_loss.BLOCK_ELEMENTS, "cpu", size)
    x, weight = torch.ones(rows, 1, dtype=torch.bfloat16), torch.zeros(size, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = draft_loss._BlockedHead.apply(x, weight, lambda logits, start: (logits[:, 0].sum(), torch.eye(1, size).expand_as(logits)))
    loss.backward()
    assert weight.grad[:, 0].tolist() == [rows, 0, 0, 0]


@pytest.mark.parametrize("flags", [{"fc_norm": True}, {"norm_output": True}, {"fc_norm": True, "norm_output": True}])
def test_eagle_3_1_equals_the_plain_loop(settings, sample, embed, lm_head, target_ids, flags):
    torch.manual_seed(0)
    head = new_head(dataclasses.replace(settings, **flags), seed=1).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    weights = {name: p.detach().clone().requires_grad_() for name, p in head.named_parameters()}
    assert ("fc_norm.2.weight" in weights) == flags.get("fc_norm", False)
    plain = plain_loss(PlainDraft(weights, 4, 2, 8, **flags), [sample], embed, lm_head, target_ids, "token", "soft cross-entropy")
    ours = module_loss(head, [sample], embed, lm_head, target_ids, "token", "soft cross-entropy")
    assert ours.item() == pytest.approx(plain.item(), abs=1e-6)
    plain.backward()
    ours.backward()
    for name, parameter in head.named_parameters():
        assert torch.allclose(parameter.grad, weights[name].grad, atol=1e-6, rtol=0), name


def test_some_teachers_are_outside_the_draft_vocabulary(sample, lm_head, target_ids):
    batch = collate([sample], K)
    known = torch.isin(argmax(batch.last, lm_head), target_ids)
    assert known.any() and not known.all()  # else the test above would not see the rule about them


def test_batching_changes_nothing(head, sample, embed):
    """Every conversation of a batch gets the logits that it gets alone."""
    other = make_sample("second", 10, ((4, 9),), seed=8)
    together = unroll(head, collate([other, sample], K), embed, K)
    alone = unroll(head, collate([sample], K), embed, K)
    for k in range(K):
        assert torch.allclose(together[k][-len(alone[k]) :] if len(alone[k]) else together[k][:0], alone[k], atol=1e-12)


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_a_steps_micro_batches_may_be_split_at_will(head, sample, embed, lm_head, target_ids, normalisation):
    """Packed and one by one, in fp32: the sums over micro-batches of losses and gradients are those of all rows at once."""
    head, embed, lm_head = head.float(), embed.float(), lm_head.float()
    samples = [
        sample,
        make_sample("b", 10, ((4, 9),), seed=8),
        make_sample("dead", 5, ((3, 4),), seed=9),
        make_sample("c", 12, ((2, 12),), 7),
    ]
    samples = [dataclasses.replace(s, aux=s.aux.astype("float32"), last=s.last.astype("float32")) for s in samples]
    found = []
    for split in ([[0, 1, 2, 3]], [[3], [0, 1], [2]], [[0], [1], [2], [3]]):
        micro = [collate([samples[i] for i in pack], K) for pack in split]
        objective = Objective("soft cross-entropy", normalisation, DECAY, denominators(micro, normalisation), torch.zeros(K))
        teacher = FullTeacher(lm_head, target_ids)
        head.zero_grad()
        loss = sum(head(batch, embed, RowTerms(batch, teacher(batch), objective))[0] for batch in micro)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in head.parameters())])
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-6) for a, b in zip(found[0], other, strict=True))


def test_the_future_is_not_seen(head, sample, embed):
    """Changing what comes after a row's chain changes none of its logits."""
    changed = sample.input_ids.copy()
    changed[7:] = (changed[7:] + 1) % 40
    aux = sample.aux.copy()
    aux[6:] += 1.0
    other = dataclasses.replace(sample, input_ids=changed, aux=aux)
    before, after = (unroll(head, collate([s], K), embed, K) for s in (sample, other))
    assert torch.equal(before[0][:3], after[0][:3])  # rows 2, 3, 4: the first turn
    assert torch.equal(before[2][:1], after[2][:1])


def test_streamed_teacher_equals_the_plain_one(lm_head, target_ids, sample, monkeypatch):
    from eagle3_offline.draft import teacher

    monkeypatch.setattr(teacher, "BLOCK", 7)
    batch = collate([sample], K)
    last = batch.last.float()
    plain = FullTeacher(lm_head, target_ids)
    rows = plain(batch)
    z = last @ lm_head.float().T
    assert torch.allclose(plain.log_normaliser(batch.last), z.logsumexp(-1), atol=1e-5)
    assert torch.equal(rows.argmax_known, torch.isin(z.argmax(-1), target_ids))
    assert torch.allclose(rows.inside, z[:, target_ids].softmax(-1), atol=1e-6) and rows.true is None


def test_turns_of_the_fixture(sample):
    assert turn_by_hand(sample) == turn_of_token(TURNS, 12).tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 2]
