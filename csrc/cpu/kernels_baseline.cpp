// The kernels compiled for Baseline.
#define GKD_ISA isa_baseline
#define GKD_VECTOR_BYTES 16
#include "kernels.inc"

namespace gkd {
extern const InstructionSet baseline = {"baseline", GKD_KERNELS(float), GKD_KERNELS(double)};
}  // namespace gkd
