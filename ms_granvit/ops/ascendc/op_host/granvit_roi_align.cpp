// Host side of ROIAlign and of its gradient: definitions, shape inference, tiling.
#include "register/op_def_registry.h"
#include "roi_align_tiling.h"
#include "tiling/platform/platform_ascendc.h"

namespace {

uint32_t Dim(const gert::Shape &shape, size_t axis) { return static_cast<uint32_t>(shape.GetDim(axis)); }

uint32_t IntAttr(const gert::TilingContext *context, size_t index)
{
    return static_cast<uint32_t>(*context->GetAttrs()->GetAttrPointer<int64_t>(index));
}

bool Shapes(const gert::Shape &array, const gert::Shape &boxes, size_t dims)
{
    return array.GetDimNum() == dims && boxes.GetDimNum() == 3 && boxes.GetDim(2) == 4 && boxes.GetDim(0) == array.GetDim(0);
}

using Plan = bool (*)(RoiAlignTiling &, uint64_t, uint64_t, uint64_t);

ge::graphStatus Launch(gert::TilingContext *context, RoiAlignTiling sizes, Plan plan)
{
    auto platform = platform_ascendc::PlatformAscendC(context->GetPlatformInfo());
    uint64_t ub = 0;
    platform.GetCoreMemSize(platform_ascendc::CoreMemType::UB, ub);
    uint32_t cores = platform.GetCoreNumAiv();
    uint64_t bytes = context->GetInputDesc(0)->GetDataType() == ge::DT_FLOAT ? 4 : 2;
    if (!plan(sizes, bytes, cores, ub)) {
        return ge::GRAPH_FAILED;
    }
    *context->GetTilingData<RoiAlignTiling>() = sizes;
    context->SetBlockDim(cores);
    context->SetTilingKey(0);
    context->GetWorkspaceSizes(1)[0] = 0;
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus TilingForward(gert::TilingContext *context)
{
    const gert::Shape &map = context->GetInputShape(0)->GetStorageShape(), &boxes = context->GetInputShape(1)->GetStorageShape();
    if (!Shapes(map, boxes, 4)) {
        return ge::GRAPH_FAILED;
    }
    return Launch(context, {Dim(map, 0), Dim(map, 1), Dim(map, 2), Dim(map, 3), Dim(boxes, 1), IntAttr(context, 0), 0, 0, 0},
                  granvit::PlanForward);
}

ge::graphStatus TilingBackward(gert::TilingContext *context)
{
    const gert::Shape &grad = context->GetInputShape(0)->GetStorageShape(), &boxes = context->GetInputShape(1)->GetStorageShape();
    if (!Shapes(grad, boxes, 5) || grad.GetDim(1) != boxes.GetDim(1) || grad.GetDim(2) != grad.GetDim(3)) {
        return ge::GRAPH_FAILED;
    }
    uint32_t height = IntAttr(context, 0), width = IntAttr(context, 1);
    RoiAlignTiling sizes{Dim(grad, 0), height, width, Dim(grad, 4), Dim(boxes, 1), Dim(grad, 2), 0, 0, 0};
    return Launch(context, sizes, granvit::PlanBackward);
}

// [B, H, W, C] and [B, K, 4] -> [B, K, grid, grid, C]
ge::graphStatus InferForward(gert::InferShapeContext *context)
{
    const gert::Shape &map = *context->GetInputShape(0), &boxes = *context->GetInputShape(1);
    int64_t grid = *context->GetAttrs()->GetAttrPointer<int64_t>(0);
    *context->GetOutputShape(0) = gert::Shape({map.GetDim(0), boxes.GetDim(1), grid, grid, map.GetDim(3)});
    return ge::GRAPH_SUCCESS;
}

// [B, K, grid, grid, C] and [B, K, 4] -> [B, height, width, C]
ge::graphStatus InferBackward(gert::InferShapeContext *context)
{
    const gert::Shape &grad = *context->GetInputShape(0);
    int64_t height = *context->GetAttrs()->GetAttrPointer<int64_t>(0), width = *context->GetAttrs()->GetAttrPointer<int64_t>(1);
    *context->GetOutputShape(0) = gert::Shape({grad.GetDim(0), height, width, grad.GetDim(4)});
    return ge::GRAPH_SUCCESS;
}

ge::graphStatus InferType(gert::InferDataTypeContext *context)
{
    return context->SetOutputDataType(0, context->GetInputDataType(0));
}

}  // namespace

namespace ops {

class RoiAlignDefinition : public OpDef {
protected:
    RoiAlignDefinition(const char *name, const char *input, const char *output) : OpDef(name)
    {
        const std::vector<ge::DataType> types{ge::DT_FLOAT, ge::DT_FLOAT16, ge::DT_BF16}, wide(3, ge::DT_FLOAT);
        const std::vector<ge::Format> formats(3, ge::FORMAT_ND);
        this->Input(input).ParamType(REQUIRED).DataType(types).Format(formats).UnknownShapeFormat(formats);
        this->Input("boxes").ParamType(REQUIRED).DataType(wide).Format(formats).UnknownShapeFormat(formats);
        this->Output(output).ParamType(REQUIRED).DataType(types).Format(formats).UnknownShapeFormat(formats);
        this->SetInferDataType(InferType);
        this->AICore().AddConfig("ascend910b");
    }
};

class GranvitRoiAlign : public RoiAlignDefinition {
public:
    explicit GranvitRoiAlign(const char *name) : RoiAlignDefinition(name, "features", "out")
    {
        this->Attr("grid").AttrType(REQUIRED).Int();
        this->SetInferShape(InferForward);
        this->AICore().SetTiling(TilingForward);
    }
};

class GranvitRoiAlignGrad : public RoiAlignDefinition {
public:
    explicit GranvitRoiAlignGrad(const char *name) : RoiAlignDefinition(name, "out_grad", "features_grad")
    {
        this->Attr("height").AttrType(REQUIRED).Int();
        this->Attr("width").AttrType(REQUIRED).Int();
        this->SetInferShape(InferBackward);
        this->AICore().SetTiling(TilingBackward);
    }
};

OP_ADD(GranvitRoiAlign);
OP_ADD(GranvitRoiAlignGrad);

}  // namespace ops
