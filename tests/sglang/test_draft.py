"""The exported draft, served by the real SGLang (EAGLE3, a chain): same answers, and the accept length of our own walk."""

import httpx
import pytest

from eagle3_offline.runs import read_json

from .conftest import server_of

CHAIN = 4
EAGLE3 = [
    "--speculative-algorithm", "EAGLE3", "--speculative-num-steps", str(CHAIN), "--speculative-eagle-topk", "1",
    "--speculative-num-draft-tokens", str(CHAIN + 1), "--speculative-draft-model-path",
]  # fmt: skip
ATTENTION = ["--prefill-attention-backend", "intel_amx", "--decode-attention-backend", "intel_amx"]  # the others cannot verify on a CPU


@pytest.mark.timeout(1800)  # the fixture runs the whole demo
def test_the_served_draft_has_the_walks_accept_length(sglang, tiny, tiny_demo, tmp_path):
    draft = tiny_demo / "drafts" / "demo"
    decoded = read_json(draft / "decoded.json")
    max_tokens = decoded["key"]["max_tokens"]
    with server_of(tiny, tmp_path / "log", 256, *EAGLE3, str(draft / "export"), *ATTENTION) as server:
        body = {
            "input_ids": [answer["prompt"] for answer in decoded["answers"]],
            "sampling_params": {"temperature": 0, "max_new_tokens": max_tokens},
        }
        served = httpx.post(f"{server.url}/generate", json=body, timeout=300).json()
    assert [answer["output_ids"] for answer in served] == [answer["plain"] for answer in decoded["answers"]]
    metas = [answer["meta_info"] for answer in served]
    tau = (sum(meta["completion_tokens"] for meta in metas) - len(metas)) / sum(meta["spec_verify_ct"] for meta in metas)
    print(f"served tau {tau:.4f}, walk {decoded['summary']['walk_tau']:.4f}, decoded {decoded['summary']['tau']:.4f}")
    assert abs(tau - decoded["summary"]["walk_tau"]) <= 0.02
