"""Random valid arguments of every operator, with its PyTorch reference: `OPERATORS`."""

import contextlib
import tempfile

import torch
from fuzz.maker import FLOATS
from fuzz.memory import LAYOUTS

from peftcore import ops
from peftcore.ops import grouped, linear_per_sample, lora, mxfp4, optim, optim_rules as rules, quant4, routing, swiglu
from peftcore.ops.activated import Activated, ActivatedBackward
from peftcore.ops.attention import Attention, AttentionBackward
from peftcore.ops.cross_entropy import CrossEntropyRows, LinearCrossEntropyRows
from peftcore.ops.dense_linear import DenseLinear
from peftcore.ops.dropout import Dropout
from peftcore.ops.gated import Gated, GatedBackward
from peftcore.ops.linear_4bit import Linear4bit, Linear4bitBackward
from peftcore.ops.rms_norm import RmsNorm, RmsNormBackward
from peftcore.ops.row_norms import RowNorms
from peftcore.ops.scaled import Scaled, ScaledBackward


def _quantize_4bit(m):
    x = m.normal(m.size(9), m.size(300), dtype=m.choice(FLOATS))
    return {"x": x, "quant_map": m.place(m.choice([ops.NF4, ops.FP4])), "blocksize": m.choice([32, 64, 4096])}


def _quantize_mxfp4(m):
    return {"x": m.normal(m.size(9), m.choice([32, 64, 96, m.size(300)]), dtype=m.choice(FLOATS))}


def _quantize_absmax(m):
    return {"absmax": m.normal(m.size(600)).abs(), "quant_map": m.place(ops.DYNAMIC8), "blocksize": m.choice([32, 256])}


def _dequantize_4bit(m):
    return {**m.packed(m.size(), m.size()), "dtype": m.choice(FLOATS)}


def _dequantize_4bit_out(m):
    given = _dequantize_4bit(m)
    layouts = [layout for layout in LAYOUTS if layout not in ("expanded", "overlapping")]
    out = m.normal(*given["packing"][2:], dtype=given.pop("dtype"), layouts=layouts)
    return {**given, "out": out}


def _dense_linear(m):
    rows, columns, dtype = m.size(), m.choice([m.size(), 64, 77]), m.choice([*FLOATS, torch.bfloat16])
    x = m.normal(*m.choice([(m.size(6),), (2, 2), ()]), columns, dtype=dtype)
    return {"x": x, "weight": m.normal(rows, columns, dtype=dtype), "bias": m.some(m.normal(rows, dtype=dtype))}


def _linear_4bit(m):
    rows, columns, dtype = m.size(), m.choice([m.size(), 64, 96, 288]), m.choice(FLOATS)
    x = m.normal(*m.choice([(m.size(),), (2, m.size(9))]), columns, dtype=dtype)
    return {"x": x, **m.packed(rows, columns), "bias": m.some(m.normal(rows, dtype=dtype))}


def _linear_4bit_backward(m):
    rows, columns = m.size(), m.choice([m.size(), 64, 96, 288])
    return {"grad": m.normal(m.size(), rows, dtype=m.choice(FLOATS)), **m.packed(rows, columns)}


def _base(m, *shape, dtype):
    if m.random.random() < 0.4:
        return m.packed(*shape)
    return {"weight": [m.normal(*shape, dtype=dtype)], "packing": []}


def _lora_linear(m):
    rows, k, n, r = m.size(), m.choice([m.size(), 64, 288]), m.size(), m.choice([1, 2, 8, 16, 17, 40])
    dtype, factors = m.choice(FLOATS), m.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
    given = {"x": m.normal(*m.choice([(rows,), (2, 3), ()]), k, dtype=dtype), **_base(m, n, k, dtype=dtype)}
    given |= {"bias": m.some(m.normal(n, dtype=dtype)), "a": m.normal(r, k, dtype=factors)}
    given |= {"b": m.normal(n, r, dtype=factors), "scale": m.choice([1.0, 0.5, -2.0])}
    if m.random.random() < 0.4:
        given |= {"dropout_p": m.choice([0.1, 0.5, 0.999]), "seed": torch.tensor(m.random.getrandbits(62))}
    return given


def _lora_linear_backward(m):
    given = _lora_linear(m)
    del given["bias"]
    x, b = given["x"], given["b"]
    grad = m.normal(*x.shape[:-1], b.shape[0], dtype=x.dtype)
    s = m.normal(x.shape[:-1].numel(), b.shape[1], layouts=["contiguous", "shifted"])
    return {"grad": grad, "s": s, **given, "needs": [m.random.random() < 0.7 for _ in range(3)]}


def _lora_linear_per_sample(m):
    given = _lora_linear(m)
    a, b, x = given.pop("a"), given.pop("b"), given["x"]
    for name in ("scale", "dropout_p", "seed"):
        given.pop(name, None)
    if x.dim() == 1:
        given["x"] = x = x.unsqueeze(0)
    count = m.choice([0, 1, 3])
    ranks = [m.choice([0, 1, 8, 17]) for _ in range(count)]
    index = m.place(torch.randint(-1, count, (x.shape[0],), generator=m.generator))
    factors = {"a": [m.normal(r, a.shape[1]) for r in ranks], "b": [m.normal(b.shape[0], r) for r in ranks]}
    return {**given, **factors, "scales": [1.5] * count, "index": index}


def _grouped_linear(m):
    """Mostly of sizes with which an expert is whole blocks."""
    experts, k, n = m.choice([1, 2, 3, 5]), m.choice([m.size(), 64, 128]), m.choice([m.size(), 64, 128])
    dtype, transposed = m.choice(FLOATS), m.random.random() < 0.5
    counts = [m.choice([0, 0, 1, 2, m.size(20), m.size(300)]) for _ in range(experts)]
    rows, ends = sum(counts) + m.choice([0, 0, 3]), torch.tensor(counts).cumsum(0).to(torch.int32)
    given = {"x": m.normal(rows, k, dtype=dtype), "offsets": m.place(ends)}
    given |= _base(m, experts, *((k, n) if transposed else (n, k)), dtype=dtype)
    given |= {"bias": m.some(m.normal(experts, n, dtype=dtype)), "factors": [], "transposed": transposed}
    if m.random.random() < 0.6:
        r, factors = m.choice([0, 1, 2, 8, 16, 17, 40]), m.choice([torch.float32, torch.float32, torch.bfloat16])
        given["factors"] = [m.normal(experts, *shape, dtype=factors) for shape in ((r, k), (n, r))]
        given["scale"] = m.choice([1.0, 0.5, -2.0])
        if m.random.random() < 0.4:
            given |= {"dropout_p": m.choice([0.1, 0.5, 0.999]), "seed": torch.tensor(m.random.getrandbits(62))}
    return given


def _grouped_linear_backward(m):
    given = _grouped_linear(m)
    del given["bias"]
    x, packing, weight, factors = given["x"], given["packing"], given["weight"], given["factors"]
    out = (packing[2:] if packing else weight[0].shape)[2 if given["transposed"] else 1]
    if factors:
        factors.append(m.normal(len(x), factors[0].shape[1], layouts=["contiguous", "shifted"]))
    else:
        given["x"] = None
    needs = [m.random.random() < 0.7, *(bool(factors) and m.random.random() < 0.7 for _ in range(2))]
    return {"grad": m.normal(len(x), out, dtype=x.dtype), **given, "needs": needs}


def _routed(m):
    index = m.place(torch.randint(0, 9, (m.size(40), m.choice([0, 1, 2, 8])), generator=m.generator))
    return {"index": index, "experts": m.choice([0, 1, 4, 9, 20])}


def _gathered(m):
    k, x = m.choice([1, 2, 8]), m.normal(m.choice([1, m.size(40)]), m.size(300), dtype=m.choice(FLOATS))
    rows = m.size(60) if len(x) else 0
    return {"x": x, "order": m.place(torch.randint(0, max(1, len(x) * k), (rows,), generator=m.generator)), "k": k}


def _combined(m):
    tokens, k = m.choice([0, 1, m.size(40)]), m.choice([1, 2, 3, 8])
    y = m.normal(tokens * k, m.size(300), dtype=m.choice(FLOATS))
    places = m.place(torch.randperm(tokens * k, generator=m.generator).view(tokens, k))
    return {"y": y, "weights": m.some(m.normal(tokens, k, dtype=m.choice([torch.float32, y.dtype]))), "places": places}


def _combined_backward(m):
    given = _combined(m)
    places, y, weights = given.pop("places"), given["y"], given["weights"]
    if weights is None:
        given["weights"] = weights = m.normal(*places.shape)
    order = m.place(torch.randperm(y.shape[0], generator=m.generator))
    grad = m.normal(len(places), y.shape[1], dtype=torch.promote_types(y.dtype, weights.dtype))
    needs = [m.random.random() < 0.7 for _ in range(2)]
    return {"grad": grad, **given, "y": y if needs[1] else None, "order": order, "needs": needs}


def _swiglu(m):
    return {"x": m.normal(*m.choice([(m.size(200),), (2, 3), ()]), 2 * m.size(300), dtype=m.choice(FLOATS))}


def _swiglu_backward(m):
    x = _swiglu(m)["x"]
    return {"grad": m.normal(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype), "x": x}


def _gated(m):
    shape, dtype = (*m.choice([(m.size(200),), (2, 3), ()]), m.size(300)), m.choice(FLOATS)
    gate, up = m.normal(*shape, dtype=dtype), m.normal(*shape, dtype=dtype)
    return {"gate": gate, "up": up, "linear": m.choice([1.0, 1.702]), "cubic": m.choice([0.0, 0.07])}


def _gated_backward(m):
    given = _gated(m)
    return {"grad": m.normal(*given["gate"].shape, dtype=given["gate"].dtype), **given}


def _attention(m):
    batch, heads, groups = m.choice([1, 2]), m.choice([1, 2, 3]), m.choice([1, 2])
    tokens, keys, size = m.choice([1, 7, 13, 50]), m.choice([1, 5, 33, 64]), m.choice([3, 16, 32, 64])
    dtype = m.choice(FLOATS)
    mask = m.choice([None, (batch, heads * groups, tokens, keys), (1, 1, tokens, keys), (batch, 1, 1, keys)])
    given = {
        "q": m.normal(batch, heads * groups, tokens, size, dtype=dtype),
        "k": m.normal(batch, heads, keys, size, dtype=dtype),
        "v": m.normal(batch, heads, keys, size, dtype=dtype),
        "mask": None if mask is None else m.normal(*mask) > -0.5,
        "causal": m.random.random() < 0.5,
        "scale": 0.25,
    }
    return {**given, **_dropped(m)}


def _dropped(m):
    if m.random.random() < 0.6:
        return {}
    return {"dropout_p": m.choice([0.1, 0.5, 0.999]), "seed": torch.tensor(m.random.getrandbits(62))}


def _activated(m):
    x = m.normal(*m.choice([(m.size(200),), (2, 3), ()]), m.size(300), dtype=m.choice(FLOATS))
    powers = {"linear": m.choice([1.0, 1.702]), "cubic": m.choice([0.0, 0.07])}
    return {"x": x, "normal": m.random.random() < 0.5, **powers}


def _activated_backward(m):
    given = _activated(m)
    return {"grad": m.normal(*given["x"].shape, dtype=given["x"].dtype), **given}


def _dropout(m):
    x = m.normal(*m.choice([(m.size(200),), (2, 3), ()]), m.size(300), dtype=m.choice(FLOATS))
    return {"x": x, "dropout_p": 0.0, **_dropped(m)}


def _attention_backward(m):
    given = _attention(m)
    out, lse = Attention(**given).compute()
    return {"grad": m.normal(*out.shape, dtype=out.dtype), "out": out, "lse": lse, **given}


def _rms_norm(m):
    x = m.normal(*m.choice([(m.size(200),), (2, 3), ()]), m.size(700), dtype=m.choice(FLOATS))
    weight = m.normal(x.shape[-1], dtype=m.choice(FLOATS))
    return {"x": x, "weight": weight, "eps": 1e-3, "offset": m.choice([0.0, 1.0]), "rounded": m.random.random() < 0.5}


def _rms_norm_backward(m):
    given = _rms_norm(m)
    given.pop("eps")
    x = given["x"]
    scale, needs = m.normal(x.shape[:-1].numel()).abs(), [m.random.random() < 0.7 for _ in range(2)]
    return {"grad": m.normal(*x.shape, dtype=x.dtype), **given, "scale": scale, "needs": needs}


def _row_norms(m):
    rows, columns, r = m.size(), m.choice([m.size(), 64, 288, 2100]), m.choice([1, 2, 8, 16, 17, 40])
    factors = m.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
    given = {**_base(m, rows, columns, dtype=m.choice(FLOATS)), "a": m.normal(r, columns, dtype=factors)}
    return given | {"b": m.normal(rows, r, dtype=factors), "scale": m.choice([1.0, 0.5, -2.0])}


def _scaled(m):
    columns = m.choice([m.size(), 64, 288, 1100])
    x = m.normal(*m.choice([(m.size(200),), (2, 3), ()]), columns, dtype=m.choice(FLOATS))
    return {"x": x, "g": m.normal(columns, dtype=m.choice([torch.float32, torch.float32, torch.bfloat16]))}


def _scaled_backward(m):
    given = _scaled(m)
    grad = m.normal(*given["x"].shape, dtype=given["x"].dtype)
    return {"grad": grad, **given, "needs": [m.random.random() < 0.7 for _ in range(2)]}


def _optim(m):
    rule, count = m.choice(list(rules.RULES)), m.choice([0, 1, 3])
    sizes = [m.size(600) for _ in range(count)]
    plain = ["contiguous", "shifted"]
    params = [m.normal(size, dtype=m.choice(FLOATS), layouts=plain) for size in sizes]
    grads = [m.normal(size, dtype=m.choice(FLOATS), layouts=plain) for size in sizes]
    rows = [0] * count
    hyperparameters = {"lion": (0.1, (0.9, 0.99), 0.1), "momentum": (2, 0.1, 0.9, 0.0, 0.1, True)}
    scalars = rules.RULES[rule].scalars.from_options(*hyperparameters.get(rule, (3, 0.1, (0.9, 0.999), 1e-8, 0.1)))
    given = {"params": params, "grads": grads, "rule": rule, "scalars": list(scalars), "steps": [3], "rows": rows}
    return given | {"streams": m.choice([[], [-1] * count, [7] * count])}, sizes


def _optim_step_(m):
    given, sizes = _optim(m)
    state = []
    for plane in rules.RULES[given["rule"]].planes:
        for count in sizes:
            many = plane.numel(count)
            state.append(m.bytes(many).contiguous() if plane.is_coded else m.normal(many).abs().contiguous())
    return {**given, "state": state}


@contextlib.contextmanager
def pages_of(given):
    """Pages for the call, whose `state` says for parameters of what sizes: "pages 300 70"."""
    rule = given["rule"] if given["rule"] in rules.RULES else "adamw"
    with tempfile.TemporaryDirectory() as folder:
        pages = ops.extension.PagedState(rule, 1 << 16, 1 << 17, folder)
        if is_pages(given["state"]):
            for size in given["state"].split()[1:]:
                pages.allocate(int(size))
            given["state"] = pages.number
        yield
        del pages


def is_pages(value):
    return isinstance(value, str) and value.startswith("pages")


def _optim_step_paged_(m):
    given, sizes = _optim(m)
    slots = list(range(len(sizes)))
    return {**given, "state": " ".join(["pages", *map(str, sizes)]), "slots": slots, "sweep": m.choice([1, 2])}


def _paged_reference(**given):
    """State is zero in new pages."""
    slots, params, pages = given.pop("slots"), given["params"], given.pop("state")
    if not is_pages(pages) or not params or given.pop("sweep") < 0:
        raise ValueError("no such state or sweep, or nothing that says on which device")
    sizes = list(map(int, pages.split()[1:]))
    if len(slots) != len(params) or len(set(slots)) != len(slots):
        raise ValueError("slots")
    if any(not 0 <= s < len(sizes) or sizes[s] != p.numel() for s, p in zip(slots, params, strict=True)):
        raise ValueError("slots of other parameters")
    planes = rules.RULES[given["rule"]].planes
    state = [torch.zeros_like(plane.new(p)) for plane in planes for p in params]
    optim.optim_step_reference(**given, state=state)


def _cross_entropy_rows_(m):
    rows, classes = m.size(40), m.choice([m.size(), 256, 700])
    labels = torch.tensor([m.choice([-100, m.random.randrange(classes)]) for _ in range(rows)], dtype=torch.int64)
    return {
        "logits": m.normal(rows, classes, dtype=m.choice(FLOATS), layouts=["contiguous", "shifted"]),
        "labels": labels,
        "class_weight": m.choice([None, m.normal(classes).abs()]),
        "grad_scale": m.choice([None, torch.tensor(0.25)]),
        "settings": [m.choice([0.0, 0.1]), m.choice([1.0, 0.5]), m.choice([0.0, 5.0]), m.choice([0.0, 0.01])],
        "ignore_index": -100,
        "gradient": m.choice([True, False]),
    }


def _linear_cross_entropy_rows(m):
    given = _cross_entropy_rows_(m)
    dtype, rows = m.choice([given.pop("logits").dtype, torch.bfloat16]), len(given["labels"])
    width, classes = m.choice([m.size(), 64, 96]), m.choice([m.size(), 256, 700, 2049, 4101])
    labels = [m.choice([-100, m.random.randrange(classes)]) for _ in range(rows)]
    return {
        "x": m.normal(rows, width, dtype=dtype),
        "weight": m.normal(classes, width, dtype=dtype),
        "bias": m.some(m.normal(classes, dtype=dtype)),
        **given,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "class_weight": m.choice([None, m.normal(classes).abs()]),
    }


def by_reference(call):
    return lambda **given: call(**given).compute()


OPERATORS = {
    "quantize_4bit": (_quantize_4bit, by_reference(quant4.Quantize4bit)),
    "quantize_mxfp4": (_quantize_mxfp4, by_reference(mxfp4.QuantizeMxfp4)),
    "quantize_absmax": (_quantize_absmax, by_reference(quant4.QuantizeAbsmax)),
    "dequantize_4bit": (_dequantize_4bit, by_reference(quant4.Dequantize4bit)),
    "dequantize_4bit.out": (_dequantize_4bit_out, by_reference(quant4.Dequantize4bitOut)),
    "dense_linear": (_dense_linear, by_reference(DenseLinear)),
    "linear_4bit": (_linear_4bit, by_reference(Linear4bit)),
    "linear_4bit_backward": (_linear_4bit_backward, by_reference(Linear4bitBackward)),
    "lora_linear": (_lora_linear, by_reference(lora.LoraLinear)),
    "lora_linear_backward": (_lora_linear_backward, by_reference(lora.LoraLinearBackward)),
    "lora_linear_per_sample": (_lora_linear_per_sample, by_reference(linear_per_sample.LoraLinearPerSample)),
    "grouped_linear": (_grouped_linear, by_reference(grouped.GroupedLinear)),
    "grouped_linear_backward": (_grouped_linear_backward, by_reference(grouped.GroupedLinearBackward)),
    "routed": (_routed, by_reference(routing.Routed)),
    "gathered": (_gathered, by_reference(routing.Gathered)),
    "combined": (_combined, by_reference(routing.Combined)),
    "combined_backward": (_combined_backward, by_reference(routing.CombinedBackward)),
    "cross_entropy_rows_": (_cross_entropy_rows_, by_reference(CrossEntropyRows)),
    "linear_cross_entropy_rows": (_linear_cross_entropy_rows, by_reference(LinearCrossEntropyRows)),
    "attention": (_attention, by_reference(Attention)),
    "attention_backward": (_attention_backward, by_reference(AttentionBackward)),
    "activated": (_activated, by_reference(Activated)),
    "activated_backward": (_activated_backward, by_reference(ActivatedBackward)),
    "dropout": (_dropout, by_reference(Dropout)),
    "gated": (_gated, by_reference(Gated)),
    "gated_backward": (_gated_backward, by_reference(GatedBackward)),
    "rms_norm": (_rms_norm, by_reference(RmsNorm)),
    "rms_norm_backward": (_rms_norm_backward, by_reference(RmsNormBackward)),
    "swiglu": (_swiglu, by_reference(swiglu.Swiglu)),
    "swiglu_backward": (_swiglu_backward, by_reference(swiglu.SwigluBackward)),
    "row_norms": (_row_norms, by_reference(RowNorms)),
    "scaled": (_scaled, by_reference(Scaled)),
    "scaled_backward": (_scaled_backward, by_reference(ScaledBackward)),
    "optim_step_": (_optim_step_, optim.optim_step_reference),
    "optim_step_paged_": (_optim_step_paged_, _paged_reference),
}
