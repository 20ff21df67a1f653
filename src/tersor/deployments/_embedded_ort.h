/* The part of ONNX Runtime's C interface that main.c calls, where its own header is not installed.

   The interface is a table of functions whose order never changes, so that programs keep running
   with newer libraries; functions that are not called here are only counted. Where the official
   onnxruntime_c_api.h is found, it is used in place of this file. */

#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct OrtEnv OrtEnv;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtStatus OrtStatus;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtValue OrtValue;

typedef enum {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL = 9,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE = 11
} ONNXTensorElementDataType;
typedef enum { ORT_LOGGING_LEVEL_WARNING = 2 } OrtLoggingLevel;
typedef enum { OrtArenaAllocator = 1 } OrtAllocatorType;
typedef enum { OrtMemTypeDefault = 0 } OrtMemType;

typedef void (*OrtUncalled)(void);

/* In brackets: the place in the table of the function above. */
typedef struct {
    OrtUncalled uncalled_0[2];
    const char *(*GetErrorMessage)(const OrtStatus *); /* [2] */
    OrtStatus *(*CreateEnv)(OrtLoggingLevel, const char *, OrtEnv **); /* [3] */
    OrtUncalled uncalled_4[3];
    OrtStatus *(*CreateSession)(const OrtEnv *, const char *, const OrtSessionOptions *,
                                OrtSession **); /* [7] */
    OrtUncalled uncalled_8[1];
    OrtStatus *(*Run)(OrtSession *, const OrtRunOptions *, const char *const *,
                      const OrtValue *const *, size_t, const char *const *, size_t,
                      OrtValue **); /* [9] */
    OrtStatus *(*CreateSessionOptions)(OrtSessionOptions **); /* [10] */
    OrtUncalled uncalled_11[13];
    OrtStatus *(*SetIntraOpNumThreads)(OrtSessionOptions *, int); /* [24] */
    OrtStatus *(*SetInterOpNumThreads)(OrtSessionOptions *, int); /* [25] */
    OrtUncalled uncalled_26[23];
    OrtStatus *(*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo *, void *, size_t,
                                                 const int64_t *, size_t,
                                                 ONNXTensorElementDataType,
                                                 OrtValue **); /* [49] */
    OrtUncalled uncalled_50[1];
    OrtStatus *(*GetTensorMutableData)(OrtValue *, void **); /* [51] */
    OrtUncalled uncalled_52[8];
    OrtStatus *(*GetTensorElementType)(const OrtTensorTypeAndShapeInfo *,
                                       ONNXTensorElementDataType *); /* [60] */
    OrtUncalled uncalled_61[3];
    OrtStatus *(*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo *,
                                             size_t *); /* [64] */
    OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *,
                                        OrtTensorTypeAndShapeInfo **); /* [65] */
    OrtUncalled uncalled_66[3];
    OrtStatus *(*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo **); /* [69] */
    OrtUncalled uncalled_70[22];
    void (*ReleaseEnv)(OrtEnv *); /* [92] */
    void (*ReleaseStatus)(OrtStatus *); /* [93] */
    void (*ReleaseMemoryInfo)(OrtMemoryInfo *); /* [94] */
    void (*ReleaseSession)(OrtSession *); /* [95] */
    void (*ReleaseValue)(OrtValue *); /* [96] */
    OrtUncalled uncalled_97[2];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *); /* [99] */
    void (*ReleaseSessionOptions)(OrtSessionOptions *); /* [100] */
    OrtUncalled uncalled_101[29];
    OrtStatus *(*AddSessionConfigEntry)(OrtSessionOptions *, const char *,
                                        const char *); /* [130] */
} OrtApi;

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

const OrtApiBase *OrtGetApiBase(void);
