// An ONNX folder from C++: token ids in, token ids out, the states carried from one conversation to the next.
//
//   remember FOLDER STOP_ID "ids of a prompt" ["ids of the next prompt" …]
//
// Every prompt begins with an empty context; what it knows of the ones before is in the states. Greedy, at most 64 tokens.
// Tokenizing is left to a library: tokenizers has bindings, and the prompt is the chat template's text.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {

const std::string kPast = "past_key_values.", kPresent = "present.", kState = ".recurrent_state";
constexpr size_t kMaxNewTokens = 64;
using Tensors = std::map<std::string, Ort::Value>;  // by input name

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

class Model {
 public:
  explicit Model(const std::string& folder) : session_(env_, (folder + "/model.onnx").c_str(), Ort::SessionOptions{}) {
    for (size_t i = 0; i < session_.GetInputCount(); ++i)
      inputs_.push_back(session_.GetInputNameAllocated(i, allocator_).get());
    for (size_t i = 0; i < session_.GetOutputCount(); ++i)
      outputs_.push_back(session_.GetOutputNameAllocated(i, allocator_).get());
  }

  // Answers one prompt from an empty context; `states` are what earlier ones left, and are replaced.
  std::vector<int64_t> Answer(std::vector<int64_t> tokens, int64_t stop, Tensors& states) {
    Tensors past;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      if (inputs_[i].rfind(kPast, 0) != 0) continue;
      auto known = states.find(inputs_[i]);
      past.emplace(inputs_[i], known != states.end() ? std::move(known->second) : Empty(i));
    }
    std::vector<int64_t> generated;
    for (int64_t seen = 0; generated.size() < kMaxNewTokens;) {
      seen += static_cast<int64_t>(tokens.size());
      const int64_t next = Step(tokens, seen, past);
      if (next == stop) break;
      generated.push_back(next);
      tokens = {next};
    }
    states.clear();
    for (auto& [name, value] : past)
      if (EndsWith(name, kState)) states.emplace(name, std::move(value));
    return generated;
  }

 private:
  // Zeros, one conversation, no past tokens: what varies is the first axis (1) and the length of keys and values (0).
  Ort::Value Empty(size_t input) {
    auto shape = session_.GetInputTypeInfo(input).GetTensorTypeAndShapeInfo().GetShape();
    shape[0] = 1;
    std::replace_if(shape.begin(), shape.end(), [](int64_t size) { return size < 0; }, int64_t{0});
    auto value = Ort::Value::CreateTensor<float>(allocator_, shape.data(), shape.size());
    std::fill_n(value.GetTensorMutableData<float>(), value.GetTensorTypeAndShapeInfo().GetElementCount(), 0.0f);
    return value;
  }

  // Feeds `tokens`, after which `seen` tokens are in the context, and gives the likeliest next one.
  int64_t Step(std::vector<int64_t>& tokens, int64_t seen, Tensors& past) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const auto count = static_cast<int64_t>(tokens.size());
    const std::vector<int64_t> row{1, count}, whole{1, seen};
    std::vector<int64_t> attended(static_cast<size_t>(seen), 1);
    const auto writes = std::make_unique<bool[]>(tokens.size());
    std::fill_n(writes.get(), tokens.size(), true);

    std::vector<const char*> names, wanted;
    std::vector<Ort::Value> values;
    for (const auto& name : inputs_) {
      names.push_back(name.c_str());
      if (name == "input_ids")
        values.push_back(Ort::Value::CreateTensor(memory, tokens.data(), tokens.size(), row.data(), row.size()));
      else if (name == "attention_mask")
        values.push_back(
            Ort::Value::CreateTensor(memory, attended.data(), attended.size(), whole.data(), whole.size()));
      else if (name == "write_mask")
        values.push_back(Ort::Value::CreateTensor(memory, writes.get(), tokens.size(), row.data(), row.size()));
      else
        values.push_back(std::move(past.at(name)));
    }
    for (const auto& name : outputs_) wanted.push_back(name.c_str());
    auto results = session_.Run(Ort::RunOptions{}, names.data(), values.data(), values.size(), wanted.data(),
                                wanted.size());
    past.clear();
    for (size_t i = 1; i < results.size(); ++i)
      past.emplace(kPast + outputs_[i].substr(kPresent.size()), std::move(results[i]));
    const float* logits = results[0].GetTensorData<float>();  // [1, 1, vocabulary]: outputs_[0]
    const auto vocabulary = results[0].GetTensorTypeAndShapeInfo().GetShape().back();
    return std::max_element(logits, logits + vocabulary) - logits;
  }

  Ort::Env env_{ORT_LOGGING_LEVEL_WARNING, "remember"};
  Ort::AllocatorWithDefaultOptions allocator_;
  Ort::Session session_;
  std::vector<std::string> inputs_, outputs_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: remember FOLDER STOP_ID \"ids of a prompt\" …\n";
    return 2;
  }
  try {
    Model model(argv[1]);
    Tensors states;
    for (int i = 3; i < argc; ++i) {
      std::istringstream words(argv[i]);
      std::vector<int64_t> tokens;
      for (int64_t token; words >> token;) tokens.push_back(token);
      for (const int64_t token : model.Answer(tokens, std::stoll(argv[2]), states)) std::cout << token << ' ';
      std::cout << std::endl;
    }
  } catch (const Ort::Exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
