"""Random and hostile calls of every operator, each beside its PyTorch reference.

    cd tests; python -m fuzz.operators LEVEL FIRST LAST [STEP]   calls of these numbers at a SIMD level: what is wrong
    cd tests; python -m fuzz.operators LEVEL 123                 one of them, with its arguments

A call is a valid one of random sizes, layouts and dtypes, of which up to three arguments are then made hostile. What
the operator gives must be what the reference gives, or both must refuse. The number of a call is all its randomness.
"""

import contextlib
import re
import resource
import sys

import torch
from fuzz.arguments import OPERATORS, is_pages, pages_of
from fuzz.maker import Maker

from peftcore import ops
from peftcore.ops import optim_rules as rules

REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError, OverflowError, MemoryError)

_SCHEMA = re.compile(r".* Expected a value of type|Tried to convert a List")
HUGE = 2**40
NUMBERS = (0, -1, 1, 3, 31, 48, 63, 257, 8192, HUGE, 2**62, 2**63 - 1, -(2**63))
REALS = (float("nan"), float("inf"), -1.0, 0.0, 1.0, 1e30, 1e-30)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool)


def _spoil(t, value):
    t = t.clone()
    if t.numel() and t.dtype.is_floating_point:
        t.view(-1)[t.numel() // 2 : t.numel() // 2 + 1] = value
    return t


def hostile_tensor(m, t):
    ways = {
        "scalar": lambda: torch.zeros((), dtype=t.dtype),
        "empty": lambda: t.new_empty((0, *t.shape[1:])),
        "empty last": lambda: t.new_empty((*t.shape[:-1], 0)),
        "flat": lambda: t.reshape(-1),
        "deeper": lambda: t.unsqueeze(m.choice([0, -1])),
        "longer": lambda: torch.cat([t, t[:1]]) if t.dim() else t.repeat(2),
        "shorter": lambda: m.place(t[:-1]) if t.dim() else t,
        "narrower": lambda: m.place(t[..., :-1]) if t.dim() else t,
        "huge": lambda: t.reshape(-1)[:1].expand(HUGE) if t.numel() else t,
        "huge rows": lambda: t.reshape(-1)[:1].reshape([1] * t.dim()).expand([HUGE, *t.shape[1:]]) if t.numel() else t,
        "dtype": lambda: t.to(m.choice(DTYPES)),
        "float8": lambda: t.float().to(torch.float8_e4m3fn),
        "complex": lambda: t.to(torch.complex64),
        "meta": lambda: t.to("meta"),
        "sparse": lambda: t.to_sparse(),
        "grad": lambda: t.detach().clone().requires_grad_(t.dtype.is_floating_point),
        "layout": lambda: m.place(t.detach()),
        "NaN": lambda: _spoil(t, float("nan")),
        "infinity": lambda: _spoil(t, float("inf")),
        "subnormal": lambda: _spoil(t, 1e-40),
        "negative": lambda: -t if t.dtype.is_floating_point else t,
        "zeros": lambda: torch.zeros_like(t),
    }
    way = m.choice(list(ways))
    if t.numel() >= HUGE and not t.is_meta:  # made so before: what touches each element never ends
        return "huge as it is", t
    return way, ways[way]()


def hostile(m, value):
    """(how, another value in the place of this one)."""
    if isinstance(value, torch.Tensor):
        return ("None", None) if m.random.random() < 0.1 else hostile_tensor(m, value)
    if isinstance(value, bool) or value is None:
        return "a tensor", torch.ones(3)
    if isinstance(value, str) and not is_pages(value):
        return "a word", m.choice(["", "nonsense", *rules.RULES])
    if isinstance(value, int) or is_pages(value):
        return "a number", m.choice(NUMBERS)
    if isinstance(value, float):
        return "a number", m.choice(REALS)
    if isinstance(value, list):
        way = m.choice(["shorter", "longer", "element"] if value else ["nothing"])
        if way == "element":
            at = m.random.randrange(len(value))
            how, new = hostile(m, value[at])
            return f"[{at}] {how}", [*value[:at], new, *value[at + 1 :]]
        return way, {"shorter": value[:-1], "longer": value + value[-1:], "nothing": value}[way]
    return "a dtype", m.choice(DTYPES)


def call_number(number):
    """(name, arguments, what was made hostile)."""
    m = Maker(number)
    name = list(OPERATORS)[number % len(OPERATORS)]
    given, done = OPERATORS[name][0](m), []
    for _ in range(m.choice([0, 1, 1, 1, 2, 3])):
        argument = m.choice(list(given))
        with contextlib.suppress(Exception):  # not everything can be done to what was made hostile before
            how, given[argument] = hostile(m, given[argument])
            done.append(f"{argument}: {how}")
    return name, given, done


# --- comparison -------------------------------------------------------------------------------------------------------


def copied(value):
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type == "meta" or value.numel() >= HUGE:
            return value
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)
    return [copied(v) for v in value] if isinstance(value, list) else value


def outcome(function, given, written):
    """Results, among them the arguments that are written; or what was raised."""
    try:
        with torch.no_grad():
            found = function(**given)
    except Exception as error:
        return error
    found = list(found) if isinstance(found, tuple | list) else [found]
    for name in written:
        value = given[name]
        found += value if isinstance(value, list) else [value]
    return found


def largest_of(value):
    """The largest finite number of a tensor in absolute value; 0 if there is none."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type == "meta":
        return 0.0
    if not value.is_floating_point():
        return 0.0
    found = value.double().abs()
    found = found[found.isfinite()]
    return float(found.max()) if found.numel() else 0.0


def different(found, wanted, rough, name):
    """Why two results of an operator are not the same, or None. `rough`: the least error, of products of bf16."""
    least = max(map(largest_of, wanted), default=0.0) if name in CANCELLING else 0.0
    for one, other in zip(found, wanted, strict=True):
        if not isinstance(other, torch.Tensor):
            continue
        if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
            return f"{one.dtype} {list(one.shape)} for {other.dtype} {list(other.shape)}"
        if one.numel() == 0 or one.device.type == "meta":
            continue
        if not one.dtype.is_floating_point:
            if (one.int() - other.int()).abs().max() > 1:  # two codes that are equally near
                return "codes differ"
            continue
        if one.dtype.itemsize == 1:  # float8 has no `isfinite`
            one, other = one.float(), other.float()
        finite = other.isfinite()
        if (one.isfinite() & ~finite).any():
            return "finite where the reference is not"
        largest = max(least, largest_of(other))
        error = (one.double() - other.double())[finite & one.isfinite()].abs()
        eps = max(torch.finfo(one.dtype).eps * 4, rough)
        if (finite & ~one.isfinite()).any():
            return "not finite where the reference is"
        if error.numel() and error.max() > eps * largest + torch.finfo(one.dtype).tiny:
            return f"off by {float(error.max()):.3g} of {float(largest):.3g}"
    return None


# Of which one result can be a difference of equal terms, as large as another result.
CANCELLING = ("attention_backward", "linear_cross_entropy_rows")
WRITTEN = {
    "cross_entropy_rows_": ("logits",),
    "optim_step_": ["params", "state"],
    "optim_step_paged_": ["params"],
    "dequantize_4bit.out": ["out"],
}


def roughness(given, name):
    """The least error of a call's results, of products of bf16 halves, or from logits that are rounded to 16 bits."""
    x = next((v for v in given.values() if isinstance(v, torch.Tensor)), None)
    if name == "linear_cross_entropy_rows" and x is not None and x.dtype in (torch.float16, torch.bfloat16):
        return torch.finfo(x.dtype).eps
    return 2.0**-13 if x is not None and x.dtype == torch.bfloat16 else 2.0**-18


def wrong_with(number):
    """None, or what is wrong with a call."""
    name, given, done = call_number(number)
    written = WRITTEN.get(name, ())
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.peftcore, base), overload or "default")
    if any(t.numel() >= HUGE for t in tensors(given, keep=lambda t: t.device.type != "meta")):
        wanted = MemoryError("no machine holds that")  # the reference would compute for days
    else:
        wanted = outcome(OPERATORS[name][1], copied_all(given), written)
    before = copied_all(given)
    with pages_of(given) if name == "optim_step_paged_" else contextlib.nullcontext():
        found = outcome(operator, given, written)
    what = f"call {number}, {name} with {', '.join(done) or 'nothing hostile'}: "
    if isinstance(found, Exception) and not isinstance(found, REFUSALS):
        return what + f"raises {found!r}"
    if isinstance(found, Exception) or isinstance(wanted, Exception):
        if isinstance(found, Exception) and (isinstance(wanted, Exception) or _SCHEMA.match(str(found))):
            return None  # both refuse, or the schema does
        return what + (
            f"raises {found!r}" if isinstance(found, Exception) else f"gives what the reference refuses ({wanted!r})"
        )
    why = different(found, wanted, roughness(given, name), name)
    if why is None:
        kept = {k: v for k, v in given.items() if k not in written}
        pairs = zip(tensors(kept), tensors(before, kept), strict=True)
        if any(
            not torch.equal(*(t.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in pair))
            for pair in pairs
        ):
            why = "an argument was written"
    return why and what + why


def copied_all(given):
    return {name: copied(value) for name, value in given.items()}


def tensors(given, names=None, keep=lambda t: t.device.type == "cpu" and t.numel() < HUGE):
    for name in names or given:
        value = given[name]
        for t in value if isinstance(value, list) else [value]:
            if isinstance(t, torch.Tensor) and t.layout == torch.strided and keep(t):
                yield t.detach()


def main(level, first, last=None, step=1):
    # What a hostile size asks for is refused, not served.
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    ops.extension.set_cpu_level(level)
    for number in range(int(first), int(last or first) + (last is None), int(step)):
        if last is None:
            print(call_number(number))
        print(f"at {number}", flush=True)  # the last line of a worker that crashed
        wrong = wrong_with(number)
        if wrong:
            print(f"WRONG {wrong}", flush=True)
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
