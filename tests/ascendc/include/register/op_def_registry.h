// A stand-in for the host interface of an operator: enough to compile op_host and to call its shape inference and tiling.
#ifndef OP_DEF_STAND_IN_H
#define OP_DEF_STAND_IN_H
#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

namespace ge {
enum DataType { DT_FLOAT, DT_FLOAT16, DT_BF16 };
enum Format { FORMAT_ND };
enum graphStatus : uint32_t { GRAPH_SUCCESS = 0, GRAPH_FAILED = 0xFFFFFFFF };
}  // namespace ge

namespace gert {
class Shape {
public:
    Shape() = default;
    Shape(const std::initializer_list<int64_t> &sizes) : dims(sizes) {}
    int64_t GetDim(size_t axis) const { return dims.at(axis); }
    size_t GetDimNum() const { return dims.size(); }
    std::vector<int64_t> dims;
};
class StorageShape {
public:
    const Shape &GetStorageShape() const { return shape; }
    Shape shape;
};
class CompileTimeTensorDesc {
public:
    ge::DataType GetDataType() const { return type; }
    ge::DataType type;
};
class RuntimeAttrs {
public:
    template <typename T> const T *GetAttrPointer(size_t index) const { return &values.at(index); }
    std::vector<int64_t> values;
};
}  // namespace gert

namespace fe {
struct PlatFormInfos {
    uint32_t cores;
    uint64_t ub;
};
}  // namespace fe

namespace gert {
class TilingContext {
public:
    const StorageShape *GetInputShape(size_t index) const { return &inputs.at(index); }
    const CompileTimeTensorDesc *GetInputDesc(size_t) const { return &desc; }
    const RuntimeAttrs *GetAttrs() const { return &attrs; }
    fe::PlatFormInfos *GetPlatformInfo() const { return &platform; }
    template <typename T> T *GetTilingData()
    {
        tiling.resize(sizeof(T));
        return reinterpret_cast<T *>(tiling.data());
    }
    ge::graphStatus SetBlockDim(uint32_t number) { return blockDim = number, ge::GRAPH_SUCCESS; }
    ge::graphStatus SetTilingKey(uint64_t) { return ge::GRAPH_SUCCESS; }
    size_t *GetWorkspaceSizes(size_t number) { return workspace.resize(number, 1), workspace.data(); }

    std::vector<StorageShape> inputs;
    CompileTimeTensorDesc desc;
    RuntimeAttrs attrs;
    mutable fe::PlatFormInfos platform;
    std::vector<uint8_t> tiling;
    std::vector<size_t> workspace;
    uint32_t blockDim = 0;
};
class InferShapeContext {
public:
    const Shape *GetInputShape(size_t index) const { return &inputs.at(index); }
    Shape *GetOutputShape(size_t) { return &output; }
    const RuntimeAttrs *GetAttrs() const { return &attrs; }
    std::vector<Shape> inputs;
    Shape output;
    RuntimeAttrs attrs;
};
class InferDataTypeContext {
public:
    ge::DataType GetInputDataType(size_t) const { return input; }
    ge::graphStatus SetOutputDataType(size_t, ge::DataType type) { return output = type, ge::GRAPH_SUCCESS; }
    ge::DataType input, output;
};
}  // namespace gert

namespace ops {
enum Option { IGNORE, OPTIONAL, REQUIRED, DYNAMIC };

struct OpParamDef {
    OpParamDef &ParamType(Option) { return *this; }
    OpParamDef &DataType(std::vector<ge::DataType> list) { return types = list.size(), *this; }
    OpParamDef &Format(std::vector<ge::Format> list) { return formats = list.size(), *this; }
    OpParamDef &UnknownShapeFormat(std::vector<ge::Format> list) { return formats = list.size(), *this; }
    size_t types = 0, formats = 0;
};
struct OpAttrDef {
    OpAttrDef &AttrType(Option) { return *this; }
    OpAttrDef &Int() { return *this; }
};
struct OpAICoreDef {
    OpAICoreDef &SetTiling(ge::graphStatus (*function)(gert::TilingContext *)) { return tiling = function, *this; }
    OpAICoreDef &AddConfig(const char *soc) { return config = soc, *this; }
    ge::graphStatus (*tiling)(gert::TilingContext *) = nullptr;
    std::string config;
};
class OpDef {
public:
    explicit OpDef(const char *type) : name(type) {}
    OpParamDef &Input(const char *input) { return inputs.push_back(input), params[input]; }
    OpParamDef &Output(const char *output) { return outputs.push_back(output), params[output]; }
    OpAttrDef &Attr(const char *attr) { return attrs.push_back(attr), attribute; }
    OpDef &SetInferShape(ge::graphStatus (*function)(gert::InferShapeContext *)) { return inferShape = function, *this; }
    OpDef &SetInferDataType(ge::graphStatus (*function)(gert::InferDataTypeContext *)) { return inferType = function, *this; }
    OpAICoreDef &AICore() { return core; }

    std::string name;
    std::vector<std::string> inputs, attrs, outputs;
    std::map<std::string, OpParamDef> params;
    OpAttrDef attribute;
    OpAICoreDef core;
    ge::graphStatus (*inferShape)(gert::InferShapeContext *) = nullptr;
    ge::graphStatus (*inferType)(gert::InferDataTypeContext *) = nullptr;
};
inline std::map<std::string, OpDef> registered;
}  // namespace ops
#define OP_ADD(Type) static const bool Type##Added = registered.emplace(#Type, Type(#Type)).second
#endif
