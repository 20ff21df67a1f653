/* Runs a network without Python: reads the inputs from files, computes, compares the outputs with
   the expected ones. network.h says what the network takes and gives. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__has_include)
#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#define OFFICIAL_HEADER
#endif
#endif
#ifndef OFFICIAL_HEADER
#include "ort.h"
#endif

#include "network.h"

static const OrtApi *ort;

static void check(OrtStatus *status) {
    if (status != NULL) {
        fprintf(stderr, "error: %s\n", ort->GetErrorMessage(status));
        exit(1);
    }
}

static void *read_file(const char *name, size_t size) {
    FILE *file = fopen(name, "rb");
    void *data = malloc(size ? size : 1);
    if (file == NULL || data == NULL || fread(data, 1, size, file) != size) {
        fprintf(stderr, "error: cannot read %zu bytes of %s\n", size, name);
        exit(1);
    }
    fclose(file);
    return data;
}

static double element(const void *data, size_t i, int type) {
    switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return ((const float *)data)[i];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return ((const double *)data)[i];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return (double)((const int64_t *)data)[i];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return ((const int32_t *)data)[i];
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return ((const int8_t *)data)[i];
    default: return ((const uint8_t *)data)[i];
    }
}

static size_t count(const Tensor *tensor) {
    size_t made = 1;
    for (size_t i = 0; i < tensor->rank; i++) made *= (size_t)tensor->shape[i];
    return made;
}

/* Compares an output with its file; returns whether it is what was expected. */
static int compare(const Tensor *tensor, OrtValue *value) {
    OrtTensorTypeAndShapeInfo *info;
    ONNXTensorElementDataType type;
    size_t elements;
    void *made;
    check(ort->GetTensorTypeAndShape(value, &info));
    check(ort->GetTensorElementType(info, &type));
    check(ort->GetTensorShapeElementCount(info, &elements));
    ort->ReleaseTensorTypeAndShapeInfo(info);
    check(ort->GetTensorMutableData(value, &made));
    if ((int)type != tensor->type || elements != count(tensor)) {
        printf("%s: %zu elements of type %d, expected %zu of type %d\n", tensor->name, elements,
               (int)type, count(tensor), tensor->type);
        return 0;
    }
    void *expected = read_file(tensor->file, tensor->bytes);
    double worst = 0, largest = 0;
    for (size_t i = 0; i < elements; i++) {
        double difference = fabs(element(made, i, type) - element(expected, i, type));
        if (!(difference <= worst) && !isnan(worst)) worst = difference; /* a NaN stays */
        largest = fmax(largest, fabs(element(expected, i, type)));
    }
    free(expected);
    printf("%s: largest difference %g, largest value %g\n", tensor->name, worst, largest);
    return worst <= TOLERANCE * (largest > 1 ? largest : 1);
}

int main(void) {
    ort = OrtGetApiBase()->GetApi(API_VERSION);
    if (ort == NULL) {
        fprintf(stderr, "error: this ONNX Runtime, %s, is too old\n",
                OrtGetApiBase()->GetVersionString());
        return 1;
    }
    OrtEnv *env;
    OrtSessionOptions *options;
    OrtSession *session;
    OrtMemoryInfo *memory;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "network", &env));
    check(ort->CreateSessionOptions(&options));
    check(ort->SetIntraOpNumThreads(options, THREADS));
    check(ort->SetInterOpNumThreads(options, 1));
    /* 4-bit weights: compute in fp32, not in int8 with activations quantized on the fly */
    check(ort->AddSessionConfigEntry(options, "session.qdq_matmulnbits_accuracy_level", "1"));
    check(ort->CreateSession(env, MODEL, options, &session));
    check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));

    const char *input_names[NUM_INPUTS], *output_names[NUM_OUTPUTS];
    OrtValue *values[NUM_INPUTS], *outputs[NUM_OUTPUTS] = {NULL};
    void *data[NUM_INPUTS];
    for (size_t i = 0; i < NUM_INPUTS; i++) {
        const Tensor *tensor = &INPUTS[i];
        input_names[i] = tensor->name;
        data[i] = read_file(tensor->file, tensor->bytes);
        check(ort->CreateTensorWithDataAsOrtValue(memory, data[i], tensor->bytes, tensor->shape,
                                                  tensor->rank,
                                                  (ONNXTensorElementDataType)tensor->type,
                                                  &values[i]));
    }
    for (size_t i = 0; i < NUM_OUTPUTS; i++) output_names[i] = OUTPUTS[i].name;

    check(ort->Run(session, NULL, input_names, (const OrtValue *const *)values, NUM_INPUTS,
                   output_names, NUM_OUTPUTS, outputs));

    int same = 1;
    for (size_t i = 0; i < NUM_OUTPUTS; i++) {
        same &= compare(&OUTPUTS[i], outputs[i]);
        ort->ReleaseValue(outputs[i]);
    }
    for (size_t i = 0; i < NUM_INPUTS; i++) {
        ort->ReleaseValue(values[i]);
        free(data[i]);
    }
    ort->ReleaseMemoryInfo(memory);
    ort->ReleaseSession(session);
    ort->ReleaseSessionOptions(options);
    ort->ReleaseEnv(env);
    puts(same ? "ok" : "the outputs differ");
    return same ? 0 : 1;
}
