#include "adamw_call.h"

#include <algorithm>

#include "tensor_checks.h"

namespace grass {
namespace {

void check_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& param, const char* allowed,
                  at::ArrayRef<at::ScalarType> dtypes) {
  TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), "grass::adamw_: ", name, " has ", tensor.dim(),
              " dimensions or gaps; pass a flat contiguous shard");
  TORCH_CHECK(tensor.numel() == param.numel(), "grass::adamw_: ", name, " has ", tensor.numel(),
              " elements but param has ", param.numel(), "; pass shards of one length");
  TORCH_CHECK(tensor.device() == param.device(), "grass::adamw_: ", name, " is on ", tensor.device(),
              " but param is on ", param.device(), "; pass tensors of one device");
  TORCH_CHECK(std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end(), "grass::adamw_: ", name,
              " is ", tensor.scalar_type(), "; use ", allowed);
}

void check(const at::Tensor& param, const std::optional<at::Tensor>& master, const at::Tensor& exp_avg,
           const at::Tensor& exp_avg_sq, const at::Tensor& grad, const at::Tensor& inv_scale, double beta1,
           double beta2, int64_t step, int64_t offset) {
  const auto any = {at::kFloat, at::kBFloat16, at::kHalf};
  const auto moments = {at::kFloat, at::kBFloat16};
  check_tensor("param", param, param, "float32, bfloat16 or float16", any);
  if (master) check_tensor("master", *master, param, "float32", {at::kFloat});
  TORCH_CHECK(master || param.scalar_type() != at::kHalf,
              "grass::adamw_: param is float16 without master weights; pass a float32 master or bfloat16 weights");
  check_tensor("exp_avg", exp_avg, param, "float32 or bfloat16", moments);
  check_tensor("exp_avg_sq", exp_avg_sq, param, "the dtype of exp_avg", {exp_avg.scalar_type()});
  check_tensor("grad", grad, param, "float32, bfloat16 or float16", any);
  TORCH_CHECK(inv_scale.numel() == 1 && inv_scale.scalar_type() == at::kFloat && inv_scale.device() == param.device(),
              "grass::adamw_: inv_scale must be one float32 value on the device of param");
  TORCH_CHECK(0 <= beta1 && beta1 < 1 && 0 <= beta2 && beta2 < 1, "grass::adamw_: betas are (", beta1, ", ", beta2,
              "); use values of at least 0 and below 1");
  TORCH_CHECK(step >= 1, "grass::adamw_: step is ", step, "; the first step is 1");
  TORCH_CHECK(offset >= 0, "grass::adamw_: offset is ", offset, "; use the index of the shard's first element");
}

}  // namespace

AdamWCall::AdamWCall(const at::Tensor& param, const std::optional<at::Tensor>& master, const at::Tensor& exp_avg,
                     const at::Tensor& exp_avg_sq, const at::Tensor& grad, const at::Tensor& inv_scale, double lr,
                     double beta1, double beta2, double eps, double weight_decay, int64_t step, bool decoupled,
                     bool maximize, int64_t seed, int64_t offset) {
  check(param, master, exp_avg, exp_avg_sq, grad, inv_scale, beta1, beta2, step, offset);
  shard = AdamWShard{param.mutable_data_ptr(),
                     master ? master->mutable_data_ptr<float>() : nullptr,
                     exp_avg.mutable_data_ptr(),
                     exp_avg_sq.mutable_data_ptr(),
                     grad.const_data_ptr(),
                     seed,
                     step,
                     offset};
  this->step = make_adamw_step(lr, beta1, beta2, eps, weight_decay, step, decoupled, maximize);
  this->inv_scale = inv_scale.const_data_ptr<float>();
  numel = param.numel();
  this->param = format_of(param);
  moment = format_of(exp_avg);
  this->grad = format_of(grad);
}

}  // namespace grass
