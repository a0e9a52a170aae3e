// A stand-in: the core count and the size of UB that the harness was called with.
#ifndef PLATFORM_STAND_IN_H
#define PLATFORM_STAND_IN_H
#include "register/op_def_registry.h"

namespace platform_ascendc {
enum class CoreMemType { UB };
class PlatformAscendC {
public:
    explicit PlatformAscendC(fe::PlatFormInfos *platform) : infos(platform) {}
    uint32_t GetCoreNumAiv() const { return infos->cores; }
    void GetCoreMemSize(CoreMemType, uint64_t &bytes) const { bytes = infos->ub; }

private:
    fe::PlatFormInfos *infos;
};
}  // namespace platform_ascendc
#endif
