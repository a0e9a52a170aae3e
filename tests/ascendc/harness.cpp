// Runs one of our operators on the host: shape inference and tiling of op_host, then the kernel, block by block.
//
//   harness forward|backward FOLDER B H W C K grid cores ub [count]
//   harness definitions
//
// FOLDER/array.bin is the features (forward) or the output's gradient (backward), FOLDER/boxes.bin the boxes; FOLDER/out.bin is
// written. With `count`, the array is zeros and nothing is computed or written: rules are checked and counted only. Prints a
// JSON object; status 3 and the name of the rule if one is broken. `definitions` prints each operator with its inputs,
// attributes and outputs. Built once for each type of features, -DDTYPE_FEATURES=... -DDTYPE_OUT_GRAD=...
#include "../../ms_granvit/ops/ascendc/op_host/granvit_roi_align.cpp"
#include "../../ms_granvit/ops/ascendc/op_kernel/granvit_roi_align.cpp"
#include "../../ms_granvit/ops/ascendc/op_kernel/granvit_roi_align_grad.cpp"

using Numbers = std::vector<int64_t>;

static uint64_t Bytes(const gert::Shape &shape, uint64_t element)
{
    for (int64_t size : shape.dims) {
        element *= size;
    }
    return element;
}

static std::vector<uint8_t> Load(const std::string &path, uint64_t bytes)
{
    std::vector<uint8_t> data(bytes);
    FILE *file = std::fopen(path.c_str(), "rb");
    if (file == nullptr || std::fread(data.data(), 1, bytes, file) != bytes) {
        std::fprintf(stderr, "%s: %llu bytes expected\n", path.c_str(), static_cast<unsigned long long>(bytes));
        std::exit(2);
    }
    std::fclose(file);
    return data;
}

static void PrintDefinitions()
{
    for (const auto &[name, op] : ops::registered) {
        std::printf("%s", name.c_str());
        for (const auto &names : {op.inputs, op.attrs, op.outputs}) {
            for (const std::string &word : names) {
                std::printf(" %s", word.c_str());
            }
        }
        std::printf("\n");
    }
}

int main(int argc, char **argv)
{
    if (argc == 2 && std::string(argv[1]) == "definitions") {
        PrintDefinitions();
        return 0;
    }
    if (argc < 11) {
        return 2;
    }
    bool forward = std::string(argv[1]) == "forward";
    std::string folder = argv[2];
    Numbers n;
    for (int i = 3; i < 11; ++i) {
        n.push_back(std::atoll(argv[i]));
    }
    harness::arithmetic = argc < 12;
    harness::ubBytes = n[7];
    if (harness::ubBytes > sizeof AscendC::ub.memory) {
        return 2;
    }
    int64_t B = n[0], H = n[1], W = n[2], C = n[3], K = n[4], grid = n[5];
    uint64_t element = sizeof(DTYPE_FEATURES);

    const ops::OpDef &op = ops::registered.at(forward ? "GranvitRoiAlign" : "GranvitRoiAlignGrad");
    gert::Shape array = forward ? gert::Shape{B, H, W, C} : gert::Shape{B, K, grid, grid, C}, boxes{B, K, 4};
    gert::RuntimeAttrs attrs{forward ? Numbers{grid} : Numbers{H, W}};
    gert::InferShapeContext shapes{{array, boxes}, {}, attrs};
    gert::TilingContext context{{{array}, {boxes}}, {element == 4 ? ge::DT_FLOAT : ge::DT_FLOAT16}, attrs,
                                {static_cast<uint32_t>(n[6]), static_cast<uint64_t>(n[7])}};
    if (op.inferShape(&shapes) != ge::GRAPH_SUCCESS || op.core.tiling(&context) != ge::GRAPH_SUCCESS) {
        std::fprintf(stderr, "tiling refuses these sizes\n");
        return 4;
    }

    uint64_t arrayBytes = Bytes(array, element), outBytes = Bytes(shapes.output, element);
    std::vector<uint8_t> in = harness::arithmetic ? Load(folder + "/array.bin", arrayBytes) : std::vector<uint8_t>(arrayBytes);
    std::vector<uint8_t> box = Load(folder + "/boxes.bin", Bytes(boxes, 4)), out(outBytes);
    harness::regions = {{"array", in.data(), arrayBytes, {}},
                        {"boxes", box.data(), box.size(), {}},
                        {"output", out.data(), outBytes, std::vector<uint16_t>(outBytes / 2)}};
    harness::blocks = context.blockDim;
    uint64_t busiest = 0;
    for (harness::block = 0; harness::block < harness::blocks; ++harness::block) {
        uint64_t before = harness::counts.vectorBytes;
        (forward ? granvit_roi_align : granvit_roi_align_grad)(in.data(), box.data(), out.data(), nullptr, context.tiling.data());
        busiest = std::max(busiest, harness::counts.vectorBytes - before);
    }
    harness::CheckOutputs();
    if (harness::arithmetic) {
        FILE *file = std::fopen((folder + "/out.bin").c_str(), "wb");
        std::fwrite(out.data(), 1, outBytes, file);
        std::fclose(file);
    }

    auto *tiling = context.GetTilingData<RoiAlignTiling>();
    const harness::Counts &c = harness::counts;
    uint64_t planned = (forward ? granvit::ForwardUb : granvit::BackwardUb)(*tiling, element) * tiling->tile;
    std::printf("{\"tile\": %u, \"rows\": %u, \"bins\": %u", tiling->tile, tiling->rows, tiling->bins);
    std::pair<const char *, uint64_t> values[] = {
        {"ub_planned", planned}, {"ub_peak", c.ubPeak},           {"bytes_in", c.bytesIn},         {"bytes_out", c.bytesOut},
        {"copies", c.copies},            {"bursts", c.bursts},            {"instructions", c.instructions},
        {"elements", c.elements},        {"vector_bytes", c.vectorBytes}, {"conversions", c.conversions},
        {"scalar_loads", c.scalarLoads}, {"busiest_vector_bytes", busiest},
    };
    for (const auto &[name, value] : values) {
        std::printf(", \"%s\": %llu", name, static_cast<unsigned long long>(value));
    }
    std::printf("}\n");
    return 0;
}
