// SPDX-License-Identifier: Apache-2.0
#include "learn/shipped_texts.h"

#include <array>

namespace ds {
namespace {

constexpr std::array<std::string_view, 36> kAnchors = {
    "What is the capital of Italy?",
    "How do I boil an egg?",
    "Who wrote Romeo and Juliet?",
    "What is 7 plus 5?",
    "Tell me a short joke.",
    "Why is the sky blue?",
    "What is the largest planet in the solar system?",
    "How can I sleep better?",
    "Write a short sentence about the sea.",
    "What does a doctor do?",
    "What is the opposite of hot?",
    "How many days are in a week?",
    "Explain what a computer is.",
    "What language is spoken in Brazil?",
    "Give me three colors.",
    "What is the boiling point of water?",
    "Who painted the Mona Lisa?",
    "What is photosynthesis?",
    "Suggest a name for a cat.",
    "What do bees make?",
    "How do I write a thank you note?",
    "What is the capital of Japan?",
    "When does the library open?",
    "What is your name?",
    "What is the password?",
    "Where can I buy bread?",
    "Who is the manager here?",
    "What is the phone number of the office?",
    "How much does it cost?",
    "What time is it?",
    "Which animal is the fastest on land?",
    "What is the chemical symbol for gold?",
    "Who was the first president of the United States?",
    "What is the freezing point of water in Celsius?",
    "How many legs does a spider have?",
    "What is the largest ocean on Earth?"};

constexpr std::array<Canary, 8> kCanaries = {{{"The Earth revolves around the", " Sun"},
                                              {"The capital of France is the city of", " Paris"},
                                              {"The Great Wall of", " China"},
                                              {"The United States of", " America"},
                                              {"for i in", " range"},
                                              {"The United Nations General", " Assembly"},
                                              {"Merry Christmas and a Happy New", " Year"},
                                              {"The moon orbits the", " Earth"}}};

constexpr std::array<std::string_view, 12> kProbe = {
    "The quick brown fox jumps over the lazy dog while the farmer watches from the fence.",
    "Photosynthesis is the process by which green plants use sunlight to make food.",
    "She opened the old wooden box and found a letter that her grandfather had written.",
    "To make tea, boil some water, pour it over the leaves and wait for a few minutes.",
    "The train to the city leaves every morning at eight and arrives before noon.",
    "A triangle has three sides, and the sum of its angles is one hundred and eighty degrees.",
    "def add(a, b):\n    \"\"\"Return the sum of two numbers.\"\"\"\n    return a + b\n",
    "Regular exercise and a balanced diet can help people stay healthy for longer.",
    "The company announced that its profits had grown by ten percent over the last year.",
    "In winter the lake freezes, and the children of the village learn to skate on it.",
    "Dear customer, thank you for your order. We will send you a message when it ships.",
    "The first computers filled whole rooms and were slower than a modern wrist watch."};

}  // namespace

std::span<const std::string_view> anchor_prompts() { return kAnchors; }
std::span<const Canary> canaries() { return kCanaries; }
std::span<const std::string_view> probe_texts() { return kProbe; }

}  // namespace ds
