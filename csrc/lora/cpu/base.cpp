#include "lora/cpu/base.h"

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include "gemm/cpu/dense/dense.h"
#include "nf4/cpu/dequantize.h"

namespace peftcore {
namespace lora {

Tensor base(const Tensor& x, const Base& of, const std::optional<Tensor>& bias) {
    if (of.quantized.packed()) return packed_linear(x, of.weight, bias, of.out_features, of.quantized);
    return bias.has_value() ? at::cpu::addmm(*bias, x, of.weight.t()) : at::cpu::mm(x, of.weight.t());
}

Tensor base_backward(const Tensor& dy, const Base& of) {
    if (of.quantized.packed()) return packed_linear_backward(dy, of.weight, of.in_features, of.quantized);
    return at::cpu::mm(dy, of.weight);
}

#if defined(PEFTCORE_HAVE_AVX512BF16)

namespace {

// For fewer rows of x, linear_4bit has kernels of its own.
constexpr int64_t kPackedFrom = 33;

const BFloat16* bits(const Tensor& t) { return static_cast<const BFloat16*>(t.const_data_ptr()); }

// W as gemm::multiply reads it.
class Right {
 public:
    Right(const Tensor& x, const Base& of) {
        if (x.scalar_type() != at::kBFloat16 || x.numel() == 0 || of.in_features * of.out_features == 0 ||
            !gemm::takes_addend())
            return;
        const Quantized& q = of.quantized;
        if (q.packed()) {
            TORCH_CHECK_VALUE(q.code.has_value(), of.op,
                              ": a packed weight needs absmax and code, found no code");
            if (x.size(0) < kPackedFrom) return;
            arguments_ = nf4::packed_arguments(of.weight, *q.absmax, *q.code, q.blocksize, q.nested_absmax,
                                               q.nested_code, q.nested_offset, q.nested_blocksize,
                                               of.out_features * of.in_features, of.op);
            const WeightView view = nf4::view_of(arguments_, of.in_features);
            if (nf4::has_tiles(view)) packed_ = view;
        } else if (of.weight.is_contiguous()) {
            dense_ = gemm::Dense{bits(of.weight), of.out_features, of.in_features};
        }
    }
    Right(const Right&) = delete;

    bool known() const { return dense_ || packed_; }
    gemm::Tiles transposed() const { return dense_ ? gemm::transposed(*dense_) : nf4::transposed(*packed_); }
    gemm::Tiles plain() const { return dense_ ? gemm::plain(*dense_) : nf4::plain(*packed_); }

 private:
    nf4::Packed arguments_;
    std::optional<gemm::Dense> dense_;
    std::optional<WeightView> packed_;
};

// Halves that are whole tiles are multiplied as they are: y takes 0.9 of the time of three parts (1024 rows,
// 576
// -> 1536, r = 64). Shorter ones would cost three tiles, where three parts fill one or two.
int parts_of(int64_t r) { return r % gemm::kHalfMultiple == 0 ? 2 : 3; }

// The parts of a factor (see Halves), beside one another or one below the other.
Tensor in_halves(const Kernels& kernels, const Tensor& from, int parts, bool left, bool below) {
    const int64_t rows = from.size(0), columns = from.size(1);
    const Tensor out = at::empty({below ? parts * rows : rows, below ? columns : parts * columns},
                                 from.options().dtype(at::kBFloat16));
    kernels.halves({from.const_data_ptr<float>(), rows, columns, parts, left, out.size(1),
                    below ? rows * columns : columns, static_cast<BFloat16*>(out.mutable_data_ptr())});
    return out;
}

gemm::Product product(const Tensor& x, const gemm::Tiles& right, const Tensor& bias, const Tensor& y) {
    return {bits(x),
            right,
            x.size(0),
            x.size(1),
            y.size(1),
            bias.defined() ? bits(bias) : nullptr,
            static_cast<BFloat16*>(y.mutable_data_ptr())};
}

}  // namespace

Tensor joined(const Kernels& kernels, const Tensor& x, const Base& of, const std::optional<Tensor>& bias,
              const Tensor& s, const Tensor& b) {
    const Right right(x, of);
    if (!right.known()) return {};
    const Tensor y = at::empty({x.size(0), of.out_features}, x.options());
    gemm::Product all = product(x, right.transposed(), bias.has_value() ? bias->contiguous() : Tensor(), y);
    const int parts = parts_of(s.size(1));
    const Tensor left = in_halves(kernels, s, parts, true, false),
                 right_parts = in_halves(kernels, b, parts, false, false);
    const gemm::Dense factor{bits(right_parts), right_parts.size(0), right_parts.size(1)};
    all.addend = {bits(left), gemm::transposed(factor), left.size(1), {}, parts == 2};
    gemm::multiply(all);
    return y;
}

Tensor joined_backward(const Kernels& kernels, const Tensor& dy, const Base& of, const Tensor& t,
                       const Tensor& a, const Mask& keep) {
    const Right right(dy, of);
    if (!right.known()) return {};
    const Tensor dx = at::empty({dy.size(0), of.in_features}, dy.options());
    gemm::Product all = product(dy, right.plain(), {}, dx);
    const int parts = parts_of(t.size(1));
    const Tensor left = in_halves(kernels, t, parts, true, false),
                 right_parts = in_halves(kernels, a, parts, false, true);
    const gemm::Dense factor{bits(right_parts), right_parts.size(0), right_parts.size(1)};
    all.addend = {bits(left), gemm::plain(factor), left.size(1), keep, parts == 2};
    gemm::multiply(all);
    return dx;
}

#else

Tensor joined(const Kernels&, const Tensor&, const Base&, const std::optional<Tensor>&, const Tensor&,
              const Tensor&) {
    return {};
}

Tensor joined_backward(const Kernels&, const Tensor&, const Base&, const Tensor&, const Tensor&,
                       const Mask&) {
    return {};
}

#endif

}  // namespace lora
}  // namespace peftcore
