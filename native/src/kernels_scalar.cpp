// Kernels for any processor: the template over one element at a time.
#include "kernels_template.h"

namespace gn {

const Kernels* kernels_scalar() { return make_kernels<ScalarVec>(); }

}  // namespace gn
